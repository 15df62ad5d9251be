"""Peak memory of quantizing a model far larger than memory, and whether it grows with depth.

    python benchmarks/quantize_memory.py 8b --layers 2 4 [--scheme w4] [--rounding gptq] [--json FILE]

For each depth writes random weights in the exact shape of Llama-3-8B or Llama-3.2-1B (or of a tiny model),
exports them to ONNX and quantizes that in a process of its own, the head with the rest and the count of
integer kernels included. The promises: at most 6 GB resident at the peak (pages of mapped files included),
and between two depths a difference of at most 10%. Exits with 1 when one is broken. FILE is continued when it
exists: one entry for each shape, scheme, rounding and dtype.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scale import PEAK_PROMISE_BYTES, SHAPES, write_random_checkpoint

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import measured_environment
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.resources import require_free_bytes
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.worker import peak_rss_bytes
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.schemes import onnx_schemes
from nirvana_deploy.quantize.weights.low_bit import ROUNDINGS

GROWTH_PROMISE = 1.1


def main() -> None:
    """Measure every depth, print a table, and say whether the promises hold."""
    options = _options()
    if options.worker:
        quantize(options, options.worker)
        return
    depths = options.layers or [SHAPES[options.shape]["num_hidden_layers"]]
    runs = [measured(options, layers) for layers in depths]
    peaks = [run["peak_rss_bytes"] for run in runs]
    kept = {"peak": max(peaks) <= PEAK_PROMISE_BYTES, "depth": max(peaks) <= GROWTH_PROMISE * min(peaks)}
    how = f"smoothing {options.smooth}" if options.scheme == "int8" else options.rounding
    name = f"{options.shape}, {options.dtype} to {options.scheme} ({how})"
    entry = {
        "environment": measured_environment(threads=1),
        "sequences": options.sequences,
        "runs": runs,
        "promise": {"peak_rss_bytes": PEAK_PROMISE_BYTES, "growth": GROWTH_PROMISE, "kept": kept},
    }
    print(name)
    for run in runs:
        print(
            f"  {run['layers']:3} layers, {run['float_bytes'] / 1e9:.2f} GB: {run['seconds']:6.1f} s, "
            f"peak {run['peak_rss_bytes'] / 1e9:.2f} GB; {run['coverage']}"
        )
    print("\n".join(f"  Promise ({name}): {'kept' if held else 'BROKEN'}" for name, held in kept.items()))
    if options.json:
        record = read_json(options.json) if options.json.is_file() else {"schema": 2, "measured": {}}
        record["measured"][name] = entry
        write_json(options.json, record)
    sys.exit(0 if all(kept.values()) else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, nargs="+", help="depths to try [the shape's own]")
    parser.add_argument("--scheme", choices=onnx_schemes(), default="w4")
    parser.add_argument("--rounding", choices=list(ROUNDINGS), default="search")
    parser.add_argument("--smooth", default="auto", help="of int8 [auto: the alpha of least KL]")
    parser.add_argument("--sequences", type=int, default=4, help="of 128 random tokens, to calibrate on [4]")
    parser.add_argument("--dtype", choices=["fp32", "fp16"], default="fp16")
    parser.add_argument("--folder", type=Path, help="where the models go for a while [the system's]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(options: argparse.Namespace, layers: int) -> dict[str, Any]:
    """Write a model of ``layers`` layers and quantize it in a fresh process; both are gone afterwards."""
    config = SHAPES[options.shape] | {"num_hidden_layers": layers}
    shape = shape_from_config(config)
    parameters = shape.linear_parameters + shape.embedding_parameters
    folder = options.folder or Path(tempfile.gettempdir())
    require_free_bytes(folder, 7 * parameters, what="The random checkpoint with its exports")
    with tempfile.TemporaryDirectory(dir=folder, prefix="nirvana-memory-") as temporary:
        work = Path(temporary)
        write_random_checkpoint(work / "checkpoint", config)
        exported = onnx_from_checkpoint(
            Checkpoint.open(work / "checkpoint"), work / "onnx", dtype=options.dtype, flavor="gqa"
        )
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(work)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"Quantizing {options.shape} with {layers} layers failed.")
        report: dict[str, Any] = read_json(work / "report.json")
    return {"layers": layers, "parameters": parameters, "float_bytes": exported.weights_bytes, **report}


def quantize(options: argparse.Namespace, work: Path) -> None:
    """Worker: quantize ``work``/onnx and report what it cost this process."""
    vocabulary = SHAPES[options.shape]["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocabulary, size=(options.sequences, 128))
    words = ("auto", "none")
    start, imported = time.perf_counter(), peak_rss_bytes()
    result = quantize_onnx(
        work / "onnx",
        work / "quantized",
        Quantization(
            scheme=options.scheme,
            rounding=options.rounding,
            smooth=options.smooth if options.smooth in words else float(options.smooth),
            head=True,
        ),
        calibration=tokens if options.scheme == "int8" or options.rounding == "gptq" else None,
    )
    write_json(
        work / "report.json",
        {
            "seconds": time.perf_counter() - start,
            "imported_rss_bytes": imported,
            "peak_rss_bytes": peak_rss_bytes(),
            "weights_bytes": result.record["weights_bytes"],
            "coverage": result.coverage.line,
        },
    )


if __name__ == "__main__":
    main()
