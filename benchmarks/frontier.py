"""What pruning saves and what it costs, beside what quantization alone saves and costs.

    python benchmarks/frontier.py OUT [OUT ...] --texts DIR [--json FILE] [--picture FILE]
    python benchmarks/frontier.py --json FILE --picture FILE        (draws again)

OUTs are folders that `nirvana-deploy prune`, `prune-export` or `recipes.py --keep` made of MODEL at several
sparsities. Dense and pruned models are exported in the gqa flavor and quantized (int8, w4; head included) on
the first folder's calibration windows. Quality: ONNX Runtime on texts of several kinds, pydoc and code among
them, 8 windows of 256 tokens each. Decode: onnxruntime-genai, all models in turns. A model is on the frontier
if none is both faster and closer to dense; whether a pruned model is, at each precision, is the question.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from decode_speed import measured_steps, summary  # the scripts beside this one
from numpy.typing import NDArray
from recipes import SHIPPED, WINDOW_TOKENS, text_files

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import default_threads, measured_environment
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.calibrate.texts import read_text_file
from nirvana_deploy.calibrate.windows import calibration_data, windows_of_text
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.quality import quality_of
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.prune.plan_file import read_plan
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.report.drawing import COLOURS, bare, entitle, new_figure
from nirvana_deploy.runtime.registry import open_runner

PRECISIONS = ("fp32", "int8", "w4")
ROUNDS, NEW_TOKENS, PROMPT_TOKENS = 11, 32, 128
WINDOWS = 8
QUANTIZED_ON = 32
"""Calibration windows for quantization: ranges and rounding want fewer than a refit does."""

Record = dict[str, Any]


def main() -> None:
    """Make what is missing, measure, print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outs", type=Path, nargs="*", metavar="OUT")
    parser.add_argument("--model", default="smollm2", help="the dense model")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="files or folders of texts")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the models here [a temporary folder]")
    parser.add_argument("--threads", type=int, help="[physical cores]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.outs:
        with tempfile.TemporaryDirectory(prefix="nirvana-frontier-") as temporary:
            record = measured(options, options.work or Path(temporary))
        if options.json:
            write_json(options.json, record)
    else:
        record = read_json(options.json)
    print(table(record))
    if options.picture:
        draw(record, options.picture)


def measured(options: argparse.Namespace, work: Path) -> Record:
    """Speed and quality of every model at every precision."""
    threads = options.threads or default_threads()
    dense = resolve_model(options.model).path
    folders, removed = made(dense, options.outs, work)
    texts = texts_of(Checkpoint.open(dense), options.texts)
    qualities = judged(folders, texts, threads)
    prompt = next(iter(texts.values())).reshape(-1)[:PROMPT_TOKENS]
    steps = measured_steps(folders, prompt, new_tokens=NEW_TOKENS, rounds=ROUNDS, threads=threads)
    models = []
    for name, folder in folders.items():
        model, _, precision = name.rpartition("/")
        models.append(
            {
                "removed_share": removed[model],
                "precision": precision,
                **summary(steps[name]),
                "weights_bytes": sum(file.stat().st_size for file in folder.glob("*.onnx*")),
                "texts": qualities[name],
            }
        )
    return {
        "schema": 1,
        "environment": measured_environment(threads=threads),
        "workload": {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "rounds": ROUNDS},
        "calibration": read_plan(options.outs[0] / "plan.json").calibration,
        "models": models,
    }


def made(dense: Path, outs: Sequence[Path], work: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """ONNX folders by "MODEL/PRECISION", made unless they are there, and the removed share of each model."""
    windows = read_windows(outs[0] / "calibration.safetensors")["calibration"][:QUANTIZED_ON]
    models, removed = {"dense": dense}, {"dense": 0.0}
    for out in outs:
        share = read_plan(out / "plan.json").budget.met_removed_share
        models[f"{share:.2f}"], removed[f"{share:.2f}"] = out / "checkpoint", share
    folders = {}
    for name, checkpoint in models.items():
        for precision in PRECISIONS:
            target = folders[f"{name}/{precision}"] = work / f"{name}-{precision}"
            if (target / "model.onnx").is_file():
                continue
            shutil.rmtree(target, ignore_errors=True)
            print(f"making {target.name}", flush=True)
            if precision == "fp32":
                onnx_from_checkpoint(Checkpoint.open(checkpoint), target, flavor="gqa")
            else:
                recipe = Quantization(scheme=precision, head=True)
                quantize_onnx(folders[f"{name}/fp32"], target, recipe, calibration=windows)
    return folders, removed


def texts_of(dense: Checkpoint, given: Sequence[Path]) -> dict[str, NDArray[np.int64]]:
    """Windows [M, T] of each kind of text; no model has been calibrated on them."""
    texts = {
        path.stem: windows_of_text(
            read_text_file(path), dense.tokenizer, seq_len=WINDOW_TOKENS, max_sequences=WINDOWS
        ).tokens
        for path in text_files(given)
    }
    for name in SHIPPED:
        drawn = calibration_data(
            name,
            dense.tokenizer,
            num_sequences=1,
            seq_len=WINDOW_TOKENS,
            seed=0,
            heldout_sequences=WINDOWS,
            heldout_len=WINDOW_TOKENS,
        )
        texts[name] = drawn.heldout.tokens
    return texts


def judged(
    folders: Mapping[str, Path], texts: Mapping[str, NDArray[np.int64]], threads: int
) -> dict[str, dict[str, Any]]:
    """Perplexity and KL of each model by kind of text."""
    kinds = [name for name, windows in texts.items() for _ in windows]
    baseline, *others = folders
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(open_runner(path, threads=threads)) for name, path in folders.items()
        }
        found = quality_of(
            runners[baseline],
            {name: runners[name] for name in others},
            np.concatenate(list(texts.values())),
            baseline_name=baseline,
            kinds=kinds,
        )
    return {name: quality["parts"] for name, quality in found.items()}


def cost(model: Record, dense: Record) -> float:
    """How many times dense's perplexity, the geometric mean over the kinds of text."""
    ratios = [
        text["perplexity"] / dense["texts"][kind]["perplexity"] for kind, text in model["texts"].items()
    ]
    return float(np.exp(np.mean(np.log(ratios))))


def frontier(models: Sequence[Record], dense: Record) -> list[Record]:
    """The models that none beats in both speed and quality, the fastest first."""
    best: list[Record] = []
    for model in sorted(models, key=lambda one: (one["p50_ms"], cost(one, dense))):
        if not best or cost(model, dense) < cost(best[-1], dense):
            best.append(model)
    return best


def label(model: Record) -> str:
    """For people: "dense w4", "40% removed, w4"."""
    share = model["removed_share"]
    return f"{share:.0%} removed, {model['precision']}" if share else f"dense {model['precision']}"


def table(record: Record) -> str:
    """Markdown: speed, bytes and quality of every model."""
    models = record["models"]
    dense = models[0]
    best = [label(model) for model in frontier(models, dense)]
    kinds = list(dense["texts"])
    lines = [
        "| model | decode ms a token | times as fast | weights MB | perplexity, mean | worst kind | "
        f"{' | '.join(kinds)} | on the frontier |",
        "|---" + "|--:" * (5 + len(kinds)) + "|---|",
    ]
    for model in models:
        times = {
            kind: text["perplexity"] / dense["texts"][kind]["perplexity"]
            for kind, text in model["texts"].items()
        }
        worst = max(times, key=times.__getitem__)
        cells = [
            label(model),
            f"{model['p50_ms']:.2f}",
            f"{dense['p50_ms'] / model['p50_ms']:.2f}",
            f"{model['weights_bytes'] / 1e6:.0f}",
            f"{cost(model, dense):.2f}x",
            f"{times[worst]:.2f}x {worst}",
            *(f"{times[kind]:.2f}x" for kind in kinds),
            "yes" if label(model) in best else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(record: Record) -> str:
    """Where pruning pays and where another model is both faster and nearer to dense, in a sentence."""
    models = record["models"]
    dense, told = models[0], []
    best = frontier(models, dense)
    for precision in PRECISIONS:
        pruned = [one for one in models if one["precision"] == precision and one["removed_share"]]
        if not pruned:
            continue
        pays = [f"{one['removed_share']:.0%}" for one in pruned if one in best]
        beaten = {
            label(min((m for m in best if _beats(m, one, dense)), key=lambda m: cost(m, dense)))
            for one in pruned
            if one not in best
        }
        what = f"in {precision} pruning is on the frontier at {', '.join(pays)}" if pays else ""
        if beaten:
            off = f"{' and '.join(sorted(beaten))} beat{'s' * (len(beaten) == 1)} "
            what = f"{what}; {off}the rest" if pays else f"in {precision} {off}every pruned model"
        told.append(what)
    return f"Speed beside quality: {'. '.join(one[:1].upper() + one[1:] for one in told)}."


def _beats(one: Record, other: Record, dense: Record) -> bool:
    """Whether ``one`` is as fast and as near to dense at least."""
    return one["p50_ms"] <= other["p50_ms"] and cost(one, dense) <= cost(other, dense)


def draw(record: Record, path: Path) -> None:
    """One figure: decode time across, perplexity up, a line for each precision, dense at its start."""
    models = record["models"]
    dense = models[0]
    figure = new_figure(4.2, width_in=7.2)
    axes = figure.subplots()
    for precision, colour in zip(PRECISIONS, ("first", "second", "third"), strict=True):
        line = [model for model in models if model["precision"] == precision]
        line.sort(key=lambda one: one["removed_share"])
        x, y = [one["p50_ms"] for one in line], [cost(one, dense) for one in line]
        axes.plot(x, y, "-o", color=COLOURS[colour], label=precision, markersize=5)
        for model, across, up in zip(line, x, y, strict=True):
            name = f"{model['removed_share']:.0%}" if model["removed_share"] else "dense"
            axes.annotate(name, (across, up), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlim(left=0)
    axes.set_xlabel("decode, ms per token")
    axes.set_ylabel("perplexity, times dense")
    axes.legend(frameon=False)
    bare(axes, ticks=True)
    entitle(axes, "Left and down is better; labels: share of linear weights removed")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
