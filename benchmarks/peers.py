"""The dense model through what people would take instead, beside ours: quality, speed, bytes, memory.

    python benchmarks/peers.py OUT --work DIR --llama-cpp NPM [--optimum PYTHON] [--openvino PYTHON]
        [--json FILE] [--picture FILE]
    python benchmarks/peers.py --json FILE --picture FILE        (prints and draws again)

OUT is a folder that `nirvana-deploy prune` or `prune-export` made. NPM is a folder in which `npm install
node-llama-cpp` was run; PYTHONs have optimum-onnx, and openvino with optimum-intel and nncf. What is in DIR
already is used again. Each model runs in a process of its own (peer_worker.py); all take turns, the same
prompts in each round, a first one not counted. Quality: logits on OUT's held-out windows against transformers
in float32. A peer that cannot be made or run, or takes longer than --limit, stands in the table with its
reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peer_artifacts import Artifact, Places, artifacts, started  # the scripts beside this one
from peer_process import PeerProcess, last_words

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import default_threads, measured_environment
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.measure.benchmark import alternate
from nirvana_deploy.measure.quality import quality_of
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.rounds.ratios import Ratio, ratio_of
from nirvana_deploy.measure.rounds.watch import machine_watch
from nirvana_deploy.measure.worker import RoundSample
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.report.compare.contest_table import REFERENCE
from nirvana_deploy.report.drawing import COLOURS, bare, entitle, label_points, new_figure
from nirvana_deploy.report.table import NO_DIFFERENCE

BASELINE = "transformers fp32"
"""Quality is measured against it."""
OURS = "ours: dense"
"""Speed-ups are over it."""
PROMPTS = (128, 512)
WANTED = (
    ("ours: pruned-w4", "onnxruntime-genai builder int4", None, 1.5),
    ("ours: pruned-w4", "llama.cpp q4_0", None, 1.3),
    ("ours: pruned-w4", "ours: pruned in llama.cpp q4_0", None, 1.0),
    ("ours: dense-w8", "llama.cpp q8_0", None, 1.0),
    ("ours: dense-w4", "llama.cpp q4_0", None, 1.0),
    ("ours: dense-int8", OURS, 512, 2.0),
    ("ours: dense-w4", OURS, 512, 1.0),
)
"""(one of ours, another, prompt or None for decode, how many times as fast it is to be at least)."""
AS_GOOD_NATS = 0.005
"""Two models of no more than this between their KLs to dense are taken to be as good as each other."""

Record = dict[str, Any]


def main() -> None:
    """Make what is missing, measure, print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the models here [a temporary folder]")
    parser.add_argument("--llama-cpp", type=Path, metavar="NPM")
    parser.add_argument("--optimum", type=Path, default=Path(sys.executable), metavar="PYTHON")
    parser.add_argument("--openvino", type=Path, default=Path(sys.executable), metavar="PYTHON")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone [all]")
    parser.add_argument("--windows", type=int, default=4, help="for quality")
    parser.add_argument("--quality", type=Path, metavar="FILE", help="take what an earlier record has of it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, help="[physical cores]")
    parser.add_argument("--limit", type=float, default=15, metavar="MINUTES", help="to make, load, answer")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.out:
        with tempfile.TemporaryDirectory(prefix="nirvana-peers-") as temporary:
            record = measured(options, Path(temporary))
        if options.json:
            write_json(options.json, record)
    else:
        record = read_json(options.json)
    print(section(record))
    if options.picture:
        draw(record, options.picture)


def measured(options: argparse.Namespace, scratch: Path) -> Record:
    """Quality and speed of every model that can be made and run."""
    threads, limit_s = options.threads or default_threads(), 60 * options.limit
    work = options.work or scratch
    places = Places(options.out, work, options.llama_cpp, options.optimum, options.openvino, limit_s)
    vocab_size = Checkpoint.open(places.dense).shape.vocab_size
    windows = read_windows(options.out / "calibration.safetensors")["heldout"][: options.windows]
    made = [one for one in artifacts(places) if not options.only or one.name in options.only]
    with ExitStack() as stack:
        running, reasons = started(made, places, stack, threads=threads)
        quality = {} if options.quality is None else _known(read_json(options.quality), len(windows))
        found, without = judged(running, windows, scratch, known=quality)
        quality |= found
        environment = measured_environment(threads=threads)
        watch = machine_watch(threads)
        lost: dict[str, NirvanaError] = {}
        samples = {
            prompt: alternate(
                {name: process for name, process in running.items() if name not in lost},
                workload=Workload(
                    prompt_tokens=prompt,
                    new_tokens=options.new_tokens if prompt == PROMPTS[0] else 2,
                    repeats=options.rounds,
                    threads=threads,
                ),
                vocab_size=vocab_size,
                watch=watch,
                lost=lost,
            )
            for prompt in PROMPTS
        }
        reasons |= {name: last_words(error.message) for name, error in lost.items()} | without
        models = [_row(one, running.get(one.name), samples, quality, reasons) for one in made]
    return {
        "schema": 1,
        "environment": environment,
        "watch": watch.record(),
        "workload": {"prompts": list(PROMPTS), "new_tokens": options.new_tokens, "rounds": options.rounds},
        "quality": {
            "source": "held-out windows of the calibration text",
            "windows": len(windows),
            "window_tokens": int(windows.shape[1]),
            "baseline": BASELINE,
        },
        "models": models,
    }


def _row(
    one: Artifact,
    peer: PeerProcess | None,
    samples: Mapping[int, Mapping[str, Sequence[RoundSample]]],
    quality: Mapping[str, Record],
    reasons: Mapping[str, str],
) -> Record:
    """All that is known of one model."""
    row: Record = {"name": one.name, "runtime": one.kind, "made": one.made, "reason": reasons.get(one.name)}
    if peer is None or one.name not in samples[PROMPTS[0]]:
        return row
    decoded = [median(sample.itl_ms) for sample in samples[PROMPTS[0]][one.name]]
    prefill = {
        str(prompt): [sample.ttft_ms for sample in of_prompt[one.name]]
        for prompt, of_prompt in samples.items()
        if one.name in of_prompt
    }
    return row | {
        "about": peer.about,
        "weights_bytes": one.weights_bytes,
        "peak_rss_bytes": peer.peak_rss_bytes,
        "decode_ms": decoded,
        "prefill_ms": prefill,
        "quality": quality.get(one.name),
    }


@dataclass
class Saved:
    """Logits that a peer wrote, as a runner that has read the windows [M, T] already."""

    windows: NDArray[np.int64]
    logits: NDArray[np.float32]
    """[M, T - 1, V]."""
    runtime = "saved"
    threads = 0
    start_token = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.logits.shape[-1])

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def prefill(
        self,
        tokens: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        answer: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], Any]:
        """The logits of a window, and a last row of which nobody asks."""
        assert answer is not None
        window = np.concatenate([tokens, answer], axis=1)
        [number] = np.flatnonzero((self.windows == window).all(axis=1))
        found = self.logits[number]
        return np.concatenate([found, found[-1:]])[None], None

    def decode(self, tokens: NDArray[np.int64], state: Any) -> tuple[NDArray[np.float32], Any]:
        """Nothing was saved of it."""
        raise NotImplementedError


def judged(
    running: Mapping[str, PeerProcess],
    windows: NDArray[np.int64],
    scratch: Path,
    *,
    known: Mapping[str, Record],
) -> tuple[dict[str, Record], dict[str, str]]:
    """Quality by model but those ``known``, and why it is not to be had of some."""
    if BASELINE not in running:
        return {}, {}
    found: dict[str, Record] = {}
    reasons: dict[str, str] = {}
    try:
        reference = Saved(windows, running[BASELINE].logits(windows, scratch / "baseline"))
    except NirvanaError as error:
        why = f"no logits of {BASELINE}: {last_words(error.message)}"
        return {}, dict.fromkeys(running, why)
    for name in [name for name in running if name not in known or name == BASELINE]:
        peer = running[name]
        print(f"judging {name}", flush=True)
        file = scratch / "logits"
        try:
            if name == BASELINE:
                found |= quality_of(reference, {}, windows, baseline_name=name)
                continue
            variant = Saved(windows, peer.logits(windows, file))
            found[name] = quality_of(reference, {name: variant}, windows, baseline_name=BASELINE)[name]
        except (NirvanaError, ValueError) as error:
            reasons[name] = f"no logits: {last_words(str(error))}"
        finally:
            file.unlink(missing_ok=True)
    return found, reasons


def _known(record: Record, windows: int) -> dict[str, Record]:
    """Quality by model, of a record of as many windows; it minds no load."""
    if record["quality"]["windows"] != windows:
        raise SystemExit(f"--quality has {record['quality']['windows']} windows, and --windows is {windows}.")
    return {one["name"]: one["quality"] for one in record["models"] if one.get("quality")}


def ran(record: Record) -> list[Record]:
    """The models that were timed."""
    return [model for model in record["models"] if model.get("decode_ms")]


def over(record: Record, fast: Record, slow: Record) -> Ratio:
    """How many times as fast in decode one model is as another, by rounds."""
    return ratio_of(slow["decode_ms"], fast["decode_ms"])


def table(record: Record) -> str:
    """Markdown: all models, the fastest decode first; those without numbers last."""
    models = sorted(ran(record), key=lambda one: median(one["decode_ms"]))
    dense = next((one for one in models if one["name"] == OURS), next(iter(models), None))
    lines = [
        "| model | KL to dense | perplexity | weights MB | decode ms a token | times our dense (95 %) | "
        "prefill 128, ms | prefill 512, ms | peak memory MB |",
        "|---" + "|--:" * 8 + "|",
    ]
    for model in models:
        quality = model["quality"]
        cells = [
            model["name"],
            f"{quality['kl_vs_dense']:.4f}" if quality else model["reason"] or "",
            f"{quality['perplexity']:.2f}" if quality else "",
            f"{model['weights_bytes'] / 1e6:.0f}",
            f"{median(model['decode_ms']):.2f}",
            REFERENCE if dense is None or model is dense else _shown(over(record, model, dense)),
            *(_prefill(model, prompt) for prompt in PROMPTS),
            f"{model['peak_rss_bytes'] / 1e6:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        f"| {one['name']} | not run: {one['reason']} |" + " |" * 7
        for one in record["models"]
        if not one.get("decode_ms")
    ]
    return "\n".join(lines)


def _shown(ratio: Ratio) -> str:
    said = f"{ratio.p50:.2f}" if ratio.shows_difference else NO_DIFFERENCE
    return f"{said} ({ratio.low:.2f} to {ratio.high:.2f})"


def _prefill(model: Record, prompt: int) -> str:
    """Median milliseconds to the first token, or why there is none."""
    found = model["prefill_ms"].get(str(prompt))
    return f"{median(found):.0f}" if found else model["reason"]


def verdict(record: Record) -> str:
    """Which peers decode faster than each of ours that is as good at least, in a sentence or two."""
    judged_ones = [one for one in ran(record) if one["quality"]]
    ours = [one for one in judged_ones if one["name"].startswith("ours")]
    told = []
    for peer in judged_ones:
        good = [one for one in ours if _kl(one) <= _kl(peer) + AS_GOOD_NATS]
        if peer in ours or not good:
            continue
        best = min(good, key=lambda one: median(one["decode_ms"]))
        ratio = over(record, peer, best)
        if ratio.shows_difference and ratio.p50 > 1:
            sizes = f"{peer['weights_bytes'] / 1e6:.0f} MB against {best['weights_bytes'] / 1e6:.0f}"
            told.append(
                f"{peer['name']} is {ratio.p50:.2f} times as fast as {best['name']}, the fastest of ours "
                f"as near to dense (KL {_kl(peer):.4f} against {_kl(best):.4f}, {sizes})"
            )
    if not told:
        return "No peer is beyond doubt faster in decode than the fastest of ours that is as near to dense."
    return f"Faster than ours beyond doubt: {'; '.join(told)}."


def _kl(model: Record) -> float:
    return float(model["quality"]["kl_vs_dense"])


def promises(record: Record) -> list[str]:
    """What was wanted of ours, a line each, and whether it is there: the interval says, or does not."""
    models = {one["name"]: one for one in ran(record)}
    lines = []
    for name, other, prompt, least in WANTED:
        if name not in models or other not in models:
            continue
        fast, slow = models[name], models[other]
        if prompt is None:
            found, what = over(record, fast, slow), "decode"
        else:
            times = [one["prefill_ms"].get(str(prompt)) for one in (slow, fast)]
            if None in times:
                continue
            found, what = ratio_of(*times), f"prefill of {prompt}"
        said = "kept" if found.low >= least else "missed" if found.high < least else "not decided"
        lines.append(
            f"- {said}: {what} of {name} at least {least:g} times as fast as of {other}: {found.p50:.2f} "
            f"({found.low:.2f} to {found.high:.2f})"
        )
    return lines


def section(record: Record) -> str:
    """Cautions, table, verdict, promises, how each was made, and where it was measured."""
    where, quality = record["environment"], record["quality"]
    made = "\n".join(f"- {one['name']}: {one['made']}{_about(one)}." for one in record["models"])
    return "\n".join(
        [
            *(f"Caution: {one}\n" for one in record["watch"]["cautions"]),
            table(record),
            "",
            verdict(record),
            "",
            *promises(record),
            "",
            made,
            "",
            f"Quality on {quality['windows']} {quality['source']}, {quality['window_tokens']} tokens each; "
            f"{record['workload']['rounds']} rounds in turns, {where['threads']} thread(s) of "
            f"{where['cpu']}, load average before the rounds {where['load_average_1min']:.1f}.",
        ]
    )


def _about(model: Record) -> str:
    told = ", ".join(f"{name} {text}" for name, text in model.get("about", {}).items())
    return f" ({told})" if told else ""


def draw(record: Record, path: Path) -> None:
    """One figure: decode time across, KL up on a logarithmic scale, a colour for ours and one for others."""
    models = [one for one in ran(record) if one["quality"]]
    figure = new_figure(5.4, width_in=7.6)
    axes = figure.subplots()
    points: list[tuple[float, float, str]] = []
    for ours, colour, label in ((True, "first", "ours"), (False, "second", "what else runs it")):
        chosen = [one for one in models if one["name"].startswith("ours") == ours]
        x = [median(one["decode_ms"]) for one in chosen]
        y = [max(_kl(one), 1e-4) for one in chosen]
        axes.plot(x, y, "o", color=COLOURS[colour], label=label, markersize=5)
        names = [one["name"].removeprefix("ours: ") for one in chosen]
        points += zip(x, y, names, strict=True)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("decode, ms per token")
    axes.set_ylabel("KL to dense, nats per token (0.0001: at most that)")
    axes.legend(frameon=False)
    bare(axes, ticks=True)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (2, 3, 4, 6, 8, 10, 15, 20, 30, 40, 60, 80, 120) if low <= tick <= high]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_yticks([], minor=True)
    entitle(axes, "Left and down is better")
    label_points(axes, points, line=[], bold=0)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
