"""The models of an output folder in several runtimes: prefill and decode, all of them in turns.

    python benchmarks/runtimes.py OUT --work DIR --llama-cpp NPM [--model NAME ...] [--runtime NAME ...]
        [--rounds 9] [--limit 300] [--json FILE]
    python benchmarks/runtimes.py --json FILE                    (prints again)

OUT is a folder of ``prune-export``; the forms of its models that it lacks are written to DIR, where what is
there is used again. NPM is a folder in which ``npm install node-llama-cpp`` was run; without it GGUF files
run in llama-cpp-python. Each model in each runtime has a process of its own (peer_worker.py), which is given
up where it answers nothing for ``--limit`` seconds; it stands in the table with the reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from peer_artifacts import Artifact, Places, gguf, make, started  # the scripts beside this one
from peer_process import PeerProcess, last_words

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import default_threads, measured_environment
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.shown.progress import ShownProgress
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.benchmark import alternate
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.rounds.ratios import Ratio, ratio_of
from nirvana_deploy.measure.rounds.watch import machine_watch
from nirvana_deploy.measure.worker import RoundSample
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.layout import CALIBRATION_FILE, CHECKPOINT, MANIFEST
from nirvana_deploy.output.variants import DENSE, PRUNED, ModelVariant, variant_named
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.schemes import weight_schemes

MODELS = (DENSE, PRUNED, f"{PRUNED}-int8", f"{PRUNED}-w4")
REFERENCE = "ONNX Runtime"
"""Ratios are to the same model in it."""
_WEIGHT_TYPES = {None: "f32", "int8": "q8_0", "w4": "q4_0"}
"""What a GGUF file holds in the place of a scheme."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """What one runtime is given."""

    kind: str
    """As of :class:`Artifact`."""
    flavor: str | None
    """Of the ONNX folder; None for a GGUF file."""
    writing: str = "ort"
    """Of weight-only linears."""


FORMS = {
    REFERENCE: Form("onnxruntime-cpu", "gqa"),
    "onnxruntime-genai": Form("onnxruntime-genai", "gqa"),
    "OpenVINO": Form("openvino-cpu", "portable", "tensorrt"),
    "llama.cpp": Form("llama.cpp", None),
}
"""Runtime -> the form of a model that is fast in it."""


def main() -> None:
    """Make what is missing, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the models here [a temporary folder]")
    parser.add_argument("--llama-cpp", type=Path, metavar="NPM")
    known = [f"{of}{scheme}" for of in (DENSE, PRUNED) for scheme in ("", "-int8", "-w4")]
    parser.add_argument(
        "--model",
        nargs="+",
        default=MODELS,
        choices=known,
        metavar="NAME",
        help=f"{', '.join(known)} [{' '.join(MODELS)}]",
    )
    parser.add_argument("--runtime", nargs="+", default=list(FORMS), choices=list(FORMS), metavar="NAME")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="[physical cores]")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for one answer")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.out:
        with tempfile.TemporaryDirectory(prefix="nirvana-runtimes-") as temporary:
            record = measured(options, options.work or Path(temporary))
        if options.json:
            write_json(options.json, record)
    else:
        record = read_json(options.json)
    print(section(record))


def measured(options: argparse.Namespace, work: Path) -> Record:
    """Speed of every model in every runtime that can be made and run."""
    threads = options.threads or default_threads()
    python = Path(sys.executable)
    places = Places(options.out, work, options.llama_cpp, python, python, options.limit)
    chosen = list(artifacts(places, options.model, options.runtime))
    workload = Workload(
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        repeats=options.rounds,
        threads=threads,
    )
    with ExitStack() as stack:
        running, reasons = started([one for *_, one in chosen], places, stack, threads=threads)
        environment, watch = measured_environment(threads=threads), machine_watch(threads)
        lost: dict[str, NirvanaError] = {}
        samples = alternate(
            running,
            workload=workload,
            vocab_size=Checkpoint.open(places.dense).shape.vocab_size,
            watch=watch,
            lost=lost,
            progress=ShownProgress(),
        )
        reasons |= {name: last_words(error.message) for name, error in lost.items()}
        models = [
            {"model": model, "runtime": runtime, "made": one.made, "reason": reasons.get(one.name)}
            | (_timed(one, running[one.name], samples[one.name]) if one.name in samples else {})
            for model, runtime, one in chosen
        ]
    return {
        "schema": 1,
        "environment": environment,
        "watch": watch.record(),
        "workload": {
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "rounds": options.rounds,
        },
        "source": read_json(options.out / MANIFEST)["model"]["name"],
        "sparsity": read_json(options.out / MANIFEST)["options"]["sparsity"],
        "models": models,
    }


def _timed(one: Artifact, peer: PeerProcess, samples: Sequence[RoundSample]) -> Record:
    return {
        "about": peer.about,
        "weights_bytes": one.weights_bytes,
        "peak_rss_bytes": peer.peak_rss_bytes,
        "prefill_ms": [sample.ttft_ms for sample in samples],
        "decode_ms": [sample.tpot_ms for sample in samples],
    }


def artifacts(
    places: Places, models: Sequence[str], runtimes: Sequence[str]
) -> Iterator[tuple[str, str, Artifact]]:
    """(model, runtime, artifact) of each pair, the models in order."""
    for model in models:
        for runtime in runtimes:
            form, variant, name = FORMS[runtime], variant_named(model), f"{model} in {runtime}"
            if form.flavor is not None:
                yield model, runtime, _folder(places, variant, form, name)
                continue
            weight_type = _WEIGHT_TYPES[variant.scheme]
            checkpoint = places.dense if variant.dense else places.out / CHECKPOINT
            file = places.work / f"{variant.parent or model}-{weight_type}.gguf"
            yield model, runtime, gguf(name, checkpoint, file, weight_type)


def _folder(places: Places, variant: ModelVariant, form: Form, name: str) -> Artifact:
    """The ONNX folder of a variant: that of the output folder where it has this form, else one to be made."""
    assert form.flavor is not None
    options = read_json(places.out / MANIFEST)["options"]
    writing = form.writing if variant.scheme in weight_schemes() else "ort"
    inside, head = places.out / variant.folder, options.get("quantize_head", False)
    made = f"flavor {form.flavor}"
    if inside.is_dir() and options["flavor"] == form.flavor and writing == "ort":
        return Artifact(name, form.kind, inside, made)
    if variant.scheme is None:
        folder = places.work / f"{variant.name}-{form.flavor}"
        checkpoint = places.dense if variant.dense else places.out / CHECKPOINT
        return Artifact(name, form.kind, folder, made, partial(_exported, checkpoint, form.flavor))
    source = _folder(places, variant_named(str(variant.parent)), form, name)
    recipe = Quantization(scheme=variant.scheme, head=head, writing=writing)
    made += f", quantize --scheme {variant.scheme}{' --head' if head else ''}"
    made += f" --writing {writing}" if writing != "ort" else ""
    folder = places.work / f"{variant.name}-{form.flavor}-{writing}"
    windows = places.out / CALIBRATION_FILE
    return Artifact(name, form.kind, folder, made, partial(_quantized, source, recipe, windows))


def _exported(checkpoint: Path, flavor: str, target: Path) -> None:
    onnx_from_checkpoint(Checkpoint.open(checkpoint), target, flavor=flavor)


def _quantized(source: Artifact, recipe: Quantization, windows: Path, target: Path) -> None:
    make(source)
    calibration = read_windows(windows)["calibration"] if windows.is_file() else None
    quantize_onnx(source.path, target, recipe, calibration=calibration)


def ratio(record: Record, one: Record, metric: str) -> Ratio | None:
    """How many times as fast one row is as the same model in ONNX Runtime, by rounds."""
    for other in record["models"]:
        same = other["model"] == one["model"] and other["runtime"] == REFERENCE
        if same and other is not one and other.get(metric) and one.get(metric):
            return ratio_of(other[metric], one[metric])
    return None


def table(record: Record) -> str:
    """Markdown: every model in every runtime; ratios are to the same model in ONNX Runtime."""
    lines = [
        "| model | runtime | weights MB | decode ms a token | times ONNX Runtime (95 %) "
        "| prefill ms | times ONNX Runtime (95 %) | peak memory MB |",
        "|---|---" + "|--:" * 6 + "|",
    ]
    for one in record["models"]:
        if not one.get("decode_ms"):
            lines.append(f"| {one['model']} | {one['runtime']} | not run: {one['reason']} |" + " |" * 5)
            continue
        cells = [one["model"], _in(one), f"{one['weights_bytes'] / 1e6:.0f}"]
        for metric, digits in (("decode_ms", 2), ("prefill_ms", 0)):
            cells += [f"{median(one[metric]):.{digits}f}", _times(record, one, metric)]
        cells.append(f"{one['peak_rss_bytes'] / 1e6:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(record: Record, one: Record, metric: str) -> str:
    """The ratio with its interval; nothing where ONNX Runtime did not run the model."""
    if one["runtime"] == REFERENCE:
        return "1"
    found = ratio(record, one, metric)
    return "" if found is None else f"{found.p50:.2f} ({found.low:.2f} to {found.high:.2f})"


def _in(one: Mapping[str, Any]) -> str:
    """The runtime, and what its file holds where that is not an ONNX folder."""
    weight_type = _WEIGHT_TYPES[variant_named(one["model"]).scheme]
    return one["runtime"] if FORMS[one["runtime"]].flavor else f"{one['runtime']} {weight_type}"


def verdict(record: Record) -> str:
    """Where another runtime is faster than ONNX Runtime beyond doubt."""
    told = []
    for metric, what in (("decode_ms", "in decode"), ("prefill_ms", "in prefill")):
        found = [(one, ratio(record, one, metric)) for one in record["models"]]
        faster = [
            f"{one['model']} in {_in(one)} {times.p50:.2f} times"
            for one, times in found
            if times is not None and times.shows_difference and times.p50 > 1
        ]
        told.append(f"{what} {', '.join(faster) if faster else 'nothing'}")
    return f"Faster than in ONNX Runtime beyond doubt: {'; '.join(told)}."


def section(record: Record) -> str:
    """Table, verdict, how each was made, and where it was measured."""
    where, load = record["environment"], record["workload"]
    forms = {f"{_in(one)}: {one['made']}": None for one in record["models"]}
    versions = {
        f"{name} {text}": None for one in record["models"] for name, text in one.get("about", {}).items()
    }
    note = (
        f"{record['source']}, pruned by {record['sparsity']:.0%}; {load['prompt_tokens']} + "
        f"{load['new_tokens']} tokens, {load['rounds']} rounds in turns, {where['threads']} thread(s) of "
        f"{where['cpu']}, load average before the rounds {where['load_average_1min']:.1f}; "
        f"{', '.join(versions)}."
    )
    made = "\n".join(f"- {one}." for one in forms)
    return "\n".join([table(record), "", verdict(record), "", made, "", note, *record["watch"]["cautions"]])


if __name__ == "__main__":
    main()
