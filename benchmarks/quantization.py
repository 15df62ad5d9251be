"""What quantization costs in KL and perplexity, and what it gains in bytes and time: one table per model.

    python benchmarks/quantization.py OUT --calib valid.txt --eval-text test.txt --json FILE
    python benchmarks/quantization.py OUT --calib valid.txt --eval-text test.txt --json FILE --quick
    python benchmarks/quantization.py OUT --speed --json FILE

OUT is an output folder of ``prune-export MODEL --preset paper --calib valid.txt --candidates 4`` with its
dense baseline: it gives the dense and the pruned model and the KL-selected calibration windows. The quality
part quantizes both of them in many ways into OUT/quantization/ and measures each on the first 8 windows of
256 tokens of --eval-text, KL against dense. Rows are written as they are measured; the same command continues
where it stopped, and --quick measures the rows that the promises are about. The speed part takes what the
quality part left in OUT/quantization/ and measures decode and prefill in alternating rounds, dense first.

Random calibration sets are windows of --calib drawn with seeds 0, 1 and 2. ``quantize_static`` and
``quantize_dynamic`` are onnxruntime's, the first with what TensorRT asks of it (signed, symmetric, weights
per channel, MatMuls alone, the head in float) on the same windows.

The weights of the alias smollm2 were dequantized from a 4-bit file with offsets in blocks of 32: figures of
w4 on them are no evidence about other models.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.calibrate.texts import read_text_file
from nirvana_deploy.calibrate.windows import calibration_data, windows_of_text
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.measure.benchmark import benchmark, variant_from_folder
from nirvana_deploy.measure.quality import quality_of
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.model.checkpoint import load_tokenizer
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.variants import variant_named
from nirvana_deploy.prune.plan_file import shape_of
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.graph.layer_parts import prompt_feeds
from nirvana_deploy.quantize.graph.linears import open_folder
from nirvana_deploy.quantize.int8.spec import read_spec, record_of
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder

EVAL_WINDOWS, EVAL_LEN = 8, 256
SEEDS = (0, 1, 2)
MODELS = {"dense": "dense/onnx", "pruned": "onnx"}
SPEED = ("dense-int8-head", "dense-w8-head", "dense-w4-head", "pruned-int8-head", "pruned-w4-head")

Windows = NDArray[np.int64]
Build = Callable[[Path], dict[str, Any]]
"""Write a folder, return what is worth remembering of how."""


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--calib", help="text of the random calibration sets")
    parser.add_argument("--eval-text", type=Path, help="another text, to measure on")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="continued when it exists")
    parser.add_argument("--quick", action="store_true", help="only the rows that the promises are about")
    parser.add_argument("--only", nargs="+", default=None, metavar="ROW", help="only these rows")
    parser.add_argument("--speed", action="store_true", help="measure latency instead")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of --speed")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    record = read_json(options.json) if options.json.is_file() else {"schema": 1, "rows": {}}
    if options.speed:
        record["speed"] = measure_speed(options)
        write_json(options.json, record)
    else:
        if not (options.calib and options.eval_text):
            parser.error("the quality part needs --calib and --eval-text")
        measure_quality(options, record)
    print(table(record))


def measure_quality(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Add the rows that are missing to ``record``, and to the file as they come."""
    out: Path = options.out
    tokenizer = load_tokenizer(out / "checkpoint")
    text = read_text_file(options.eval_text)
    evaluated = windows_of_text(text, tokenizer, seq_len=EVAL_LEN, max_sequences=EVAL_WINDOWS)
    record["evaluation"] = {"text_sha256": text.sha256, "windows": EVAL_WINDOWS, "tokens": EVAL_LEN}
    record["model"] = Run.open(out).manifest["model"]["name"]
    dense = OrtDecoder(out / MODELS["dense"], threads=options.threads)
    sets = calibration_sets(out, options.calib, tokenizer)
    record["calibration"] = {name: list(windows.shape) for name, windows in sets.items()}
    built = out / "quantization"
    for name, model, build, quick in rows(out, sets):
        wanted = name in options.only if options.only else quick or not options.quick
        if name in record["rows"] or not wanted:
            continue
        folder = out / MODELS[model] if name in MODELS else built / name
        started = time.perf_counter()
        about = build(folder)
        seconds = time.perf_counter() - started
        variants = {} if name == "dense" else {name: OrtDecoder(folder, threads=options.threads)}
        quality = quality_of(dense, variants, evaluated.tokens)[name]
        record["rows"][name] = {
            "model": model,
            "weights_bytes": sum(file.stat().st_size for file in folder.glob("*.data")),
            "seconds": seconds,
            **about,
            "quality": quality,
        }
        del variants
        write_json(options.json, record)
        print(f"{name}: KL {quality['kl_vs_dense']:.4f}", flush=True)
        if folder.is_relative_to(built) and name not in SPEED:
            shutil.rmtree(folder)


def calibration_sets(out: Path, calib: str, tokenizer: Any) -> dict[str, Windows]:
    """The KL-selected windows of the run, and random ones of the same text and shape by seed."""
    selected = read_windows(out / "calibration.safetensors")["calibration"]
    sets = {"selected": selected}
    for seed in SEEDS:
        drawn = calibration_data(
            calib,
            tokenizer,
            num_sequences=selected.shape[0],
            seq_len=selected.shape[1],
            seed=seed,
            heldout_sequences=0,
            heldout_len=selected.shape[1],
        )
        sets[f"seed {seed}"] = drawn.calibration.tokens
    return sets


def rows(out: Path, sets: dict[str, Windows]) -> Iterator[tuple[str, str, Build, bool]]:
    """(name, model, how it is built, whether a promise is about it), in the order of the table."""
    selected = sets["selected"]

    def ours(model: str, calibration: Windows, *, scheme: str, **how: Any) -> Build:
        def build(folder: Path) -> dict[str, Any]:
            done = quantize_onnx(
                out / MODELS[model], folder, Quantization(scheme=scheme, **how), calibration=calibration
            )
            about = {"scheme": scheme, "coverage": done.record["coverage"]}
            for key in ("alpha", "ranges"):
                if key in done.record.get("int8", {}):
                    about[key] = done.record["int8"][key]
            return about

        return build

    def nothing(folder: Path) -> dict[str, Any]:
        return {"scheme": "fp32"}

    for model in MODELS:
        yield model, model, nothing, True
        yield f"{model}-int8", model, ours(model, selected, scheme="int8"), True
    dense = MODELS["dense"]
    yield "dense-int8-keep10", "dense", ours("dense", selected, scheme="int8", keep_fp=10), True
    yield "dense-int8-float-down", "dense", lambda folder: float_down(out / dense, folder, selected), True
    for seed in SEEDS:
        yield f"dense-int8-seed{seed}", "dense", ours("dense", sets[f"seed {seed}"], scheme="int8"), True
    for smooth in ("none", 0.5, 0.6, 0.7, 0.8, 0.9):
        how = {"scheme": "int8", "smooth": smooth}
        yield f"dense-int8-alpha-{smooth}", "dense", ours("dense", selected, **how), False
    for ranges in ("percentile", "entropy", "mse"):
        how = {"scheme": "int8", "smooth": 0.7, "ranges": ranges}
        yield f"dense-int8-{ranges}", "dense", ours("dense", selected, **how), False
    yield "onnxruntime-static", "dense", lambda folder: static_of_ort(out / dense, folder, selected), True
    yield "onnxruntime-dynamic", "dense", lambda folder: dynamic_of_ort(out / dense, folder), True
    for model in MODELS:
        for scheme in ("w8", "w4"):
            yield f"{model}-{scheme}", model, ours(model, selected, scheme=scheme), True
    for size in (64, 128):
        how = {"scheme": "w4", "block_size": size}
        yield f"dense-w4-block{size}", "dense", ours("dense", selected, **how), False
    for model, scheme in (name.removesuffix("-head").split("-") for name in SPEED):
        yield f"{model}-{scheme}-head", model, ours(model, selected, scheme=scheme, head=True), True


def float_down(source: Path, folder: Path, calibration: Windows) -> dict[str, Any]:
    """int8 with every down_proj in float: the decision of int8 with those linears taken out."""
    quantize_onnx(source, folder, Quantization(scheme="int8"), calibration=calibration)
    spec = read_spec(folder)
    others = {name: linear for name, linear in spec.linears.items() if not name.endswith("down_proj")}
    decided = record_of(scheme="int8", int8=replace(spec, linears=others).to_json())
    done = quantize_onnx(source, folder, Quantization(scheme="int8"), decided=decided)
    return {"scheme": "int8", "coverage": asdict(done.coverage), "alpha": spec.alpha}


def static_of_ort(source: Path, folder: Path, calibration: Windows) -> dict[str, Any]:
    """``onnxruntime.quantization.quantize_static`` with settings that TensorRT takes."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    decoder = OrtDecoder(source)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            inputs = decoder._session.get_inputs()
            self.feeds = iter(
                [prompt_feeds(inputs, {"input_ids": w[None]}, where=source) for w in calibration]
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    folder.mkdir(parents=True)
    quantize_static(
        source / "model.onnx",
        folder / "model.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=[head_node(source)],
        use_external_data_format=True,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
            "DedicatedQDQPair": True,
        },
    )
    return {"scheme": "int8"}


def dynamic_of_ort(source: Path, folder: Path) -> dict[str, Any]:
    """``onnxruntime.quantization.quantize_dynamic``: int8 weights per channel, uint8 activations."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder.mkdir(parents=True)
    quantize_dynamic(
        source / "model.onnx",
        folder / "model.onnx",
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[head_node(source)],
        use_external_data_format=True,
    )
    return {"scheme": "int8 dynamic"}


def head_node(source: Path) -> str:
    """Name of the MatMul of the head."""
    (graph,) = open_folder(source)
    return next(str(linear.node.name) for linear in graph.linears if linear.role == "head")


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Latencies of dense and of the SPEED folders, in alternating rounds."""
    out: Path = options.out
    variants = [variant_from_folder("dense", out / MODELS["dense"], shape_of(out, variant_named("dense")))]
    for name in SPEED:
        folder = out / "quantization" / name
        if folder.is_dir():
            shape = shape_of(out, variant_named(name.split("-")[0]))
            variants.append(variant_from_folder(name, folder, shape, float_arithmetic=False))
    workload = Workload(repeats=options.repeats, threads=options.threads)
    result: dict[str, Any] = benchmark(variants, workload=workload)
    for row in result["variants"]:
        row["path"] = os.path.relpath(row["path"], out)
    return result


def table(record: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| model | weights MB | KL vs dense | perplexity | integer linears |", "|---|---|---|---|---|"]
    for name, row in record["rows"].items():
        quality, coverage = row["quality"], row.get("coverage")
        error = quality["kl_standard_error"]
        covered = f"{coverage['found']}/{coverage['promised']}" if coverage else "-"
        lines.append(
            f"| {name} | {row['weights_bytes'] / 1e6:.0f} | {quality['kl_vs_dense']:.4f} +- {error or 0:.4f} "
            f"| {quality['perplexity']:.2f} | {covered} |"
        )
    comparisons = record.get("speed", {}).get("comparisons", ())
    lines += [""] if comparisons else []  # behind it the table ends
    for comparison in comparisons:
        lines.append(
            f"- {comparison['variant']}: decode {comparison['tpot_speedup']:.2f}x, "
            f"prefill {comparison['prefill_speedup']:.2f}x of {comparison['baseline']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
