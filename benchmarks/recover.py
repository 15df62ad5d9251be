"""What recovery brings back: the same cut trained for several budgets, judged on texts that had no say.

    python benchmarks/recover.py OUT --budget 16k 64k 200k --texts DIR --out recover.jsonl
    python benchmarks/recover.py OUT --budget 64k --learning-rate 3e-5 1e-4 3e-4 --batch 2 4 --out sweep.jsonl
    python benchmarks/recover.py OUT --budget 64k --method lora full distill --text self mix --out it.jsonl
    python benchmarks/recover.py OUT --budget 64k --steps 1 2 4 --out steps.jsonl
    python benchmarks/recover.py OUT --budget 64k --for w4 none --patience 99 --rounded --out recover-w4.jsonl
    python benchmarks/recover.py REFIT TAYLOR RANDOM --budget 200k --out trainability.jsonl --figure FILE.png
    python benchmarks/recover.py --table --out recover.jsonl

OUT is a folder that `nirvana-deploy prune` or `prune-export` made, by any recipe; it is copied, not touched.
Every combination of what is listed is one row with all its settings: the course, perplexity and KL of
transformers' logits on each kind of text (--texts, one kind a file; pydoc and code held out of training),
and what the model writes to twenty prompts, the report's among them; the first row of an OUT is the cut
itself. With --rounded each row has the same texts once more, for the model that `quantize` makes of it by
default, in ONNX Runtime. --patience 99 lets every training use its whole budget. Rows are appended; what is
there is not measured again, and a killed one goes on if --work keeps its folder. Tasks, with --tasks DIR, are
those of recipes.py. The figure shows KL on text set aside against tokens, a line for each cut and setting.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kinds import judged as judged_folders  # the scripts beside this one
from kinds import texts_of
from numpy.typing import NDArray
from recipes import mean_accuracy, read_rows, with_tasks

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.machine import cpu_seconds, default_threads, environment, peak_rss_bytes
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.answers import NEW_TOKENS
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import CALIBRATION_FILE, CHECKPOINT, RECIPE_FILE
from nirvana_deploy.output.run import Run
from nirvana_deploy.pipeline.job import job_of
from nirvana_deploy.pipeline.prune_export import run_job
from nirvana_deploy.pipeline.recipe_file import read_recipe
from nirvana_deploy.prune.plan import PrunePlan
from nirvana_deploy.prune.plan_file import read_plan
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.schemes import onnx_schemes
from nirvana_deploy.quantize.stage import decided_in_training
from nirvana_deploy.recover.recipe import METHODS
from nirvana_deploy.recover.stage import greedy_answers
from nirvana_deploy.report.drawing import COLOURS, bare, entitle, new_figure
from nirvana_deploy.report.pages.quality import repeats
from nirvana_deploy.verify.cases import PROMPTS

Row = dict[str, Any]
ASKED = (
    *PROMPTS,
    "The largest planet of the solar system is",
    "Shakespeare is best known for",
    "Plants make sugar from sunlight, water and",
    "The three primary colours are",
    "If it rains tomorrow, we will",
    "Once upon a time, in a village by the sea,",
    "Dear Sir or Madam, I am writing to",
    "The train left the station at noon and",
    "To make tea, first boil the water, then",
    "The main causes of the First World War were",
    "A week has seven days: Monday,",
    "Two plus two is four, and three plus three is",
    "import json\n\ndef read_settings(path):",
    "SELECT name, price FROM products WHERE",
    "Returns a list of the names in the directory given by path.",
)
"""Prompts on which loops are counted: the report's, then facts, tales, letters, lists, sums, code."""
_FACT = ("The capital of France is", "Paris")
SETTINGS = {
    "budget": "recover",
    "method": "recover_method",
    "text": "recover_text",
    "learning_rate": "learning_rate",
    "batch": "recover_batch",
    "seq_len": "recover_seq_len",
    "steps": "recover_steps",
    "for": "recover_for",
    "patience": "recover_patience",
}
"""What a row is trained with -> the option of ``recover``."""
_JUDGED = ("limit", "rounded")
_CUT = ("sparsity", "saliency", "allocation", "reconstruct", "seed", "calibrated_on")
_USUAL = {
    "saliency": "refit",
    "allocation": "curves",
    "reconstruct": True,
    "seed": 0,
    "method": "distill",
    "learning_rate": 1e-4,
    "batch": 4,
    "seq_len": None,
    "steps": 1,
    "patience": 4,
}
"""What is not said of a row."""
_ADDED = ("patience",)
"""Settings that no older row has: the folders of rows with the usual value keep their names."""
_NOT_COPIED = shutil.ignore_patterns("onnx*", "dense", "engine", "*.gguf")


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outs", type=Path, nargs="*", metavar="OUT")
    parser.add_argument("--budget", nargs="+", default=[], help="as --recover takes it")
    parser.add_argument("--method", nargs="+", default=["distill"], choices=METHODS)
    parser.add_argument("--text", nargs="+", default=["mix"], help="as --recover-text takes it")
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="as --recover-batch takes it")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[None], help="of training windows")
    parser.add_argument("--steps", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--for",
        type=lambda name: None if name == "none" else name,
        nargs="+",
        default=[None],
        help="as --recover-for takes it, or none",
    )
    parser.add_argument("--patience", type=int, nargs="+", default=[4], help="recover_patience")
    parser.add_argument(
        "--rounded", nargs="?", const="w4", choices=onnx_schemes(), help="judge as deployed in it, too [w4]"
    )
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="files or folders of texts")
    parser.add_argument("--tasks", type=Path, default=None, help="folder of local tasks")
    parser.add_argument("--limit", type=int, default=500, help="items of each task")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the folders here [a temporary one]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = read_rows(options.out)
    if not options.table:
        with tempfile.TemporaryDirectory(prefix="nirvana-recover-") as temporary:
            for out in options.outs:
                for row in measured(out, options, Path(temporary), {key(row) for row in rows}):
                    rows.append(row)
                    write_bytes(options.out, "".join(json.dumps(one) + "\n" for one in rows).encode())
                    print(line(row), flush=True)
    print(table(rows))
    if options.figure:
        draw(rows, options.figure)


def measured(out: Path, options: argparse.Namespace, temporary: Path, done: set[str]) -> Iterator[Row]:
    """The cut, and each recovery of it that is not there yet."""
    with Run.open(out) as run:
        dense = Checkpoint.open(run.dense)
    texts = texts_of(dense, options.texts)
    about = about_the_cut(read_plan(out / "plan.json")) | {
        "limit": options.limit if options.tasks else None,
        "rounded": options.rounded,
        "deployed": True if options.rounded else None,
    }
    cut = about | dict.fromkeys(("method", "text", "learning_rate")) | {"budget": "0"}
    if key(cut) not in done:
        yield cut | judged(out, dense, texts, options)
    listed = [vars(options)[name] for name in SETTINGS]
    for settings in (dict(zip(SETTINGS, one, strict=True)) for one in itertools.product(*listed)):
        row = about | settings
        if key(row) in done:
            continue
        trained = key(row | dict.fromkeys(_JUDGED))
        name = f"{out.name}-{hashlib.sha256(trained.encode()).hexdigest()[:12]}"
        folder = (options.work or temporary) / name
        if not folder.exists():
            copy = folder.with_name(f"{name}.copy")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(out, copy, ignore=_NOT_COPIED)
            copy.rename(folder)
        started = cpu_seconds()
        base = read_recipe(folder / RECIPE_FILE)
        asked = {SETTINGS[name]: value for name, value in settings.items()}
        run_job(job_of(base.model, asked, base=base), out=folder, until="checkpoint", resume=True)
        spent = {"cpu_s": cpu_seconds() - started, "peak_rss_bytes": peak_rss_bytes()}
        with Run.open(folder) as run:
            courses = [
                run.result(step.named(stage.RECOVER), Row) for step in stage.in_steps(settings["steps"])
            ]
        course = {"course": courses[-1], "courses_before": courses[:-1]}
        yield row | spent | course | judged(folder, dense, texts, options)
        if not options.work:
            shutil.rmtree(folder)


def about_the_cut(plan: PrunePlan) -> Row:
    """What tells one cut from another."""
    return {
        "sparsity": plan.sparsity,
        "saliency": plan.saliency,
        "allocation": plan.allocation,
        "reconstruct": plan.reconstruct is not None,
        "seed": plan.seed,
        "calibrated_on": plan.calibration["source"] if plan.calibration else None,
    }


def judged(
    out: Path, dense: Checkpoint, texts: Mapping[str, NDArray[np.int64]], options: argparse.Namespace
) -> Row:
    """Quality, answers and accuracies of the checkpoint of an output folder."""
    pruned = Checkpoint.open(out / CHECKPOINT)
    answers = dict(zip(ASKED, greedy_answers(pruned, ASKED, NEW_TOKENS), strict=True))
    row: Row = {
        "texts": compared(dense.load(), pruned.load(), texts),
        "answers": answers,
        "written": written(answers),
        "environment": environment() | {"load_average_1min": os.getloadavg()[0]},
    }
    if options.rounded:
        row["rounded_texts"] = deployed(options.rounded, out, dense, texts)
    return row | with_tasks(out / CHECKPOINT, options) if options.tasks else row


def written(answers: Mapping[str, str]) -> Row:
    """On how many prompts a model repeats itself, by the report's rule, and whether it knows a fact."""
    prompt, fact = _FACT
    return {
        "prompts": len(answers),
        "loops": sum(map(repeats, answers.values())),
        "says_paris": fact in answers[prompt],
    }


def deployed(
    scheme: str, out: Path, dense: Checkpoint, texts: Mapping[str, NDArray[np.int64]]
) -> dict[str, Row]:
    """As :func:`compared`, for what ``quantize`` makes of ``out`` by default, in ONNX Runtime."""
    recipe = Quantization(scheme=scheme)
    with tempfile.TemporaryDirectory(prefix="nirvana-deployed-") as temporary, Run.open(out) as run:
        models = {name: Path(temporary) / name for name in ("dense", "float", scheme)}
        onnx_from_checkpoint(dense, models["dense"])
        onnx_from_checkpoint(Checkpoint.open(out / CHECKPOINT), models["float"])
        quantize_onnx(
            models.pop("float"),
            models[scheme],
            recipe,
            calibration=read_windows(out / CALIBRATION_FILE)["calibration"],
            decided=decided_in_training(run, recipe),
        )
        found = judged_folders(models, texts, default_threads())
    return {
        name: {
            "tokens": part["tokens"],
            "kl": part["kl_vs_dense"],
            "kl_standard_error": part["kl_standard_error"],
            "perplexity": part["perplexity"],
            "dense_perplexity": found["dense"][name]["perplexity"],
        }
        for name, part in found[scheme].items()
    }


@torch.inference_mode()
def compared(dense: Any, pruned: Any, texts: Mapping[str, NDArray[np.int64]]) -> dict[str, Row]:
    """Perplexity of both and KL(dense || pruned) on windows [M, T] of each kind, from whole logits."""
    found = {}
    for name, windows in texts.items():
        kl, losses = [], []
        for window in torch.from_numpy(windows):
            log_p, log_q = (one(window[None]).logits[0].log_softmax(-1) for one in (dense, pruned))
            kl.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
            following = window[1:, None]
            losses.append([float(-one[:-1].gather(1, following).mean()) for one in (log_p, log_q)])
        dense_loss, loss = np.mean(losses, axis=0)
        found[name] = {
            "tokens": int(windows.size),
            "kl": float(np.mean(kl)),
            "kl_standard_error": float(np.std(kl, ddof=1) / np.sqrt(len(kl))),
            "perplexity": float(np.exp(loss)),
            "dense_perplexity": float(np.exp(dense_loss)),
        }
    return found


def key(row: Row) -> str:
    """What makes two rows the same measurement; older ones lack what was always usual."""
    said = _USUAL | row | {"rounded": scheme_of(row) if row.get("rounded") else None}
    named = [said.get(name) for name in (*_CUT, *SETTINGS, *_JUDGED) if name not in _ADDED]
    return json.dumps([*named, *(said[name] for name in _ADDED if said[name] != _USUAL[name])])


def scheme_of(row: Row) -> str:
    """As what a row was judged beside float; older ones were rounded with scales of least error."""
    scheme = row["rounded"] if isinstance(row.get("rounded"), str) else "w4"
    return f"{scheme}, as deployed" if row.get("deployed") else f"{scheme} by search"


def line(row: Row) -> str:
    """One row for people who wait."""
    texts = ", ".join(f"{name} {text['perplexity']:.1f}" for name, text in row["texts"].items())
    return f"{row['sparsity']:g} {name_of(row)} {row['budget']}: {texts}"


def name_of(row: Row) -> str:
    """The cut and the way of training, in as far as they are not the usual ones."""
    said = {
        name: value for name, value in row.items() if name in _USUAL and value not in (None, _USUAL[name])
    }
    cut = [str(said[name]) for name in ("saliency", "allocation") if name in said]
    cut += ["plain"] if "reconstruct" in said else []
    cut += [f"seed {said['seed']}"] if "seed" in said else []
    way = [row["method"] or "the cut", *([f"for {row['for']}"] if row.get("for") else [])]
    ways = {
        "learning_rate": "rate {:g}",
        "batch": "batch {}",
        "seq_len": "{} tokens",
        "steps": "{} steps",
        "patience": "patience {}",
    }
    way += [shown.format(said[name]) for name, shown in ways.items() if name in said]
    way += [row["rounded_as"]] if row.get("rounded_as") else []
    return ", ".join([*way, *cut])


def table(rows: list[Row]) -> str:
    """Markdown: perplexity and its ratio to dense, by kind of text; rounded rows beside their own.

    Then loops, whether Paris is said, and mean accuracy on tasks, where they were asked for.
    """
    rows = [one for row in rows for one in (row, _rounded(row)) if one]
    kinds = list(dict.fromkeys(name for row in rows for name in row["texts"]))
    lines = [
        f"| sparsity | method | trained on | tokens | minutes | {' | '.join(kinds)} "
        f"| loops of {len(ASKED)} | Paris | zero-shot |",
        "|---" * (8 + len(kinds)) + "|",
    ]
    for row in sorted(rows, key=lambda one: (one["sparsity"], one["method"] or "", str(one["budget"]))):
        courses = courses_of(row)
        seconds = sum(course["seconds"] + course["writing_seconds"] for course in courses)
        cells = [
            f"{text['perplexity']:.1f}, {text['perplexity'] / text['dense_perplexity']:.2f}x"
            if (text := row["texts"].get(kind))
            else ""
            for kind in kinds
        ]
        tokens = sum(course["tokens"] for course in courses)
        about = [
            f"{row['sparsity']:g}",
            name_of(row),
            row["text"] or "",
            f"{tokens:,}{_kept(courses[-1]) if courses else ''}",
            f"{seconds / 60:.0f}",
        ]
        lines.append(f"| {' | '.join([*about, *cells, *_asked(row)])} |")
    return "\n".join(lines)


def _kept(course: Row) -> str:
    """Where the state that was kept was not the last."""
    points = [point["tokens"] for point in course["curve"] if point["step"] == course["kept_step"]]
    return "" if points == [course["tokens"]] else f", kept {points[0]:,}"


def _asked(row: Row) -> tuple[str, str, str]:
    """Loops, Paris and accuracy of a row; empty where it was not asked so much."""
    found = row.get("written")
    loops, fact = (str(found["loops"]), "yes" if found["says_paris"] else "no") if found else ("", "")
    return loops, fact, mean_accuracy(row["tasks"]) if "tasks" in row else ""


def courses_of(row: Row) -> list[Row]:
    """The course of each step; none of a cut."""
    return [*row.get("courses_before", ()), row["course"]] if "course" in row else []


def draw(rows: list[Row], path: Path) -> None:
    """One figure: tokens across, KL to dense on text set aside up, a line for each cut and way of training.

    Of several budgets the longest; of several steps the last, behind the tokens of those before.
    """
    longest: dict[tuple[float, str, str], Row] = {}
    for row in (one for one in rows if "course" in one):
        name = (row["sparsity"], name_of(row), row["text"])
        longest[name] = max(longest.get(name, row), row, key=lambda one: one["course"]["tokens"])
    figure = new_figure(4.2, width_in=7.2)
    axes = figure.subplots()
    series = [COLOURS[name] for name in ("first", "second", "third", "fourth", "fifth")]
    for number, ((sparsity, name, text), row) in enumerate(sorted(longest.items())):
        before = sum(course["tokens"] for course in courses_of(row)[:-1])
        curve = row["course"]["curve"]
        axes.plot(
            [(before + point["tokens"]) / 1000 for point in curve],
            [point["kl"] for point in curve],
            color=series[number % len(series)],
            linestyle=("-", "--", ":")[number // len(series) % 3],
            marker="o",
            markersize=4,
            label=f"{sparsity:g}, {name}, on {text}",
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("thousands of tokens")
    axes.set_ylabel("KL to dense, nats per token")
    axes.legend(frameon=False, fontsize=8)
    bare(axes, ticks=True)
    entitle(axes, "Recovery of different cuts, on text set aside")
    figure.savefig(path, dpi=150)


def _rounded(row: Row) -> Row | None:
    """The row of the same model as deployed, if that was judged."""
    if "rounded_texts" not in row:
        return None
    asked = {name: value for name, value in row.items() if name not in ("written", "tasks")}
    return asked | {"texts": row["rounded_texts"], "rounded_as": scheme_of(row)}


if __name__ == "__main__":
    main()
