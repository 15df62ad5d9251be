"""Peak memory of quantizing a model far larger than it: seconds and peak RSS in a fresh process.

    python benchmarks/quantize_memory.py 8b [--layers N] [--scheme w4] [--rounding search] [--json FILE]

Writes random weights in the exact shape of Llama-3-8B or Llama-3.2-1B, exports them to ONNX (fp16, the head
quantized with the rest) and quantizes that in a fresh process, the count of integer kernels included. The
promise is a peak of at most 6 GB whatever the depth: --layers 2 and the full shape should show nearly the
same. Exits with 1 when it is broken.
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

from nirvana_deploy.artifact import read_json, write_json
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.environment import measured_environment
from nirvana_deploy.measure.worker import peak_rss_bytes
from nirvana_deploy.quantize.low_bit import ROUNDINGS
from nirvana_deploy.quantize.quantize import SCHEMES, quantize_onnx


def main() -> None:
    """Write the model, quantize it in a fresh process, and say whether the promise holds."""
    options = _options()
    if options.worker:
        quantize(options, options.worker)
        return
    config = SHAPES[options.shape] | {"num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="nirvana-memory-") as temporary:
        work = Path(temporary)
        write_random_checkpoint(work / "checkpoint", config)
        exported = onnx_from_checkpoint(work / "checkpoint", work / "onnx", dtype=options.dtype, flavor="gqa")
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(work)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"Quantizing {options.shape} failed.")
        measured: dict[str, Any] = read_json(work / "report.json")
    record = {
        "schema": 1,
        "environment": measured_environment(threads=1),
        "shape": options.shape,
        "layers": options.layers,
        "scheme": options.scheme,
        "rounding": options.rounding,
        "dtype": options.dtype,
        "float_bytes": exported.weights_bytes,
        **measured,
        "promise_peak_rss_bytes": PEAK_PROMISE_BYTES,
    }
    kept = record["peak_rss_bytes"] <= PEAK_PROMISE_BYTES
    print(
        f"{options.shape}, {options.layers} layers, {options.scheme} ({options.rounding}): "
        f"{record['float_bytes'] / 1e9:.2f} GB to {record['weights_bytes'] / 1e9:.2f} GB in "
        f"{record['seconds']:.0f} s, peak {record['peak_rss_bytes'] / 1e9:.2f} GB "
        f"({record['peak_before_bytes'] / 1e9:.2f} GB of it before the first weight); {record['coverage']}\n"
        f"Promise ({PEAK_PROMISE_BYTES / 1e9:.0f} GB): {'kept' if kept else 'BROKEN'}"
    )
    if options.json:
        write_json(options.json, record)
    sys.exit(0 if kept else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--scheme", choices=[s for s in SCHEMES if s != "int8"], default="w4")
    parser.add_argument("--rounding", choices=list(ROUNDINGS), default="search")
    parser.add_argument("--sequences", type=int, default=4, help="of 128 random tokens, for gptq [4]")
    parser.add_argument("--dtype", choices=["fp32", "fp16"], default="fp16")
    parser.add_argument("--folder", type=Path, help="where the models go for a while [the system's]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.layers = options.layers or SHAPES[options.shape]["num_hidden_layers"]
    return options


def quantize(options: argparse.Namespace, work: Path) -> None:
    """Worker: quantize ``work``/onnx and report."""
    vocabulary = SHAPES[options.shape]["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocabulary, size=(options.sequences, 128))
    before, start = peak_rss_bytes(), time.perf_counter()
    result = quantize_onnx(
        work / "onnx",
        work / "quantized",
        scheme=options.scheme,
        rounding=options.rounding,
        head=True,
        calibration=tokens if options.rounding == "gptq" else None,
    )
    write_json(
        work / "report.json",
        {
            "seconds": time.perf_counter() - start,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_before_bytes": before,
            "weights_bytes": result.weights_bytes,
            "coverage": result.coverage.line,
        },
    )


if __name__ == "__main__":
    main()
