"""Peak memory of the ONNX export when the model is larger than memory, and whether it grows with depth.

    python benchmarks/export_scale.py 8b [--layers 2 4] [--dtype fp16] [--flavor gqa] [--json FILE]

Writes a checkpoint of random bf16 weights in the shape of Llama-3-8B or Llama-3.2-1B (or of a tiny model) for
each depth, and exports it in a process of its own. The promises: at most 4 GB resident at the peak (pages of
mapped files included), and between two depths a difference of at most 10%. Exits with 1 when one is broken.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scale import SHAPES, write_random_checkpoint

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.machine import measured_environment
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.resources import require_free_bytes
from nirvana_deploy.export.dtypes import DTYPES
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.worker import peak_rss_bytes
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.families import shape_from_config

PEAK_PROMISE_BYTES = 4_000_000_000
GROWTH_PROMISE = 1.1


def main() -> None:
    """Measure every depth, print a table, and say whether the promises hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, nargs="+", help="depths to try [the shape's own]")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp16")
    parser.add_argument("--flavor", choices=["portable", "gqa"], default="portable")
    parser.add_argument("--folder", type=Path, help="where the files go for a while [the system's]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        export_here(options.worker, dtype=options.dtype, flavor=options.flavor)
        return
    depths = options.layers or [SHAPES[options.shape]["num_hidden_layers"]]
    runs = [measured(options, layers) for layers in depths]
    peaks = [run["peak_rss_bytes"] for run in runs]
    kept = {"peak": max(peaks) <= PEAK_PROMISE_BYTES, "depth": max(peaks) <= GROWTH_PROMISE * min(peaks)}
    record = {
        "schema": 1,
        "environment": measured_environment(threads=1),
        "shape": options.shape,
        "dtype": options.dtype,
        "flavor": options.flavor,
        "runs": runs,
        "promise": {"peak_rss_bytes": PEAK_PROMISE_BYTES, "growth": GROWTH_PROMISE, "kept": kept},
    }
    print(f"{options.shape}, {options.dtype}, {options.flavor}")
    for run in runs:
        print(
            f"  {run['layers']:3} layers, {run['weights_bytes'] / 1e9:6.2f} GB written: "
            f"{run['seconds']:6.1f} s, {run['cpu_s']:6.1f} s CPU, peak {run['peak_rss_bytes'] / 1e9:.2f} GB"
        )
    print("\n".join(f"  Promise ({name}): {'kept' if held else 'BROKEN'}" for name, held in kept.items()))
    if options.json:
        write_json(options.json, record)
    sys.exit(0 if all(kept.values()) else 1)


def measured(options: argparse.Namespace, layers: int) -> dict[str, Any]:
    """Write a checkpoint of ``layers`` layers and export it in a fresh process; both are gone afterwards."""
    config = SHAPES[options.shape] | {"num_hidden_layers": layers}
    shape = shape_from_config(config)
    parameters = shape.linear_parameters + shape.embedding_parameters
    folder = options.folder or Path(tempfile.gettempdir())
    bytes_each = 2 + DTYPES[options.dtype].ir.itemsize  # the checkpoint is bf16
    require_free_bytes(folder, int(bytes_each * parameters), what="The random checkpoint with its export")
    with tempfile.TemporaryDirectory(dir=folder, prefix="nirvana-export-") as temporary:
        work = Path(temporary)
        write_random_checkpoint(work / "dense", config)
        command = [sys.executable, __file__, options.shape, "--worker", str(work)]
        command += ["--dtype", options.dtype, "--flavor", options.flavor]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"The export of {options.shape} with {layers} layers failed.")
        report: dict[str, Any] = read_json(work / "report.json")
    return {"layers": layers, "parameters": parameters, **report}


def export_here(work: Path, *, dtype: str, flavor: str) -> None:
    """Worker: export, and report what it cost this process."""
    start, cpu, imported = time.perf_counter(), time.process_time(), peak_rss_bytes()
    exported = onnx_from_checkpoint(
        Checkpoint.open(work / "dense"), work / "onnx", dtype=dtype, flavor=flavor
    )
    write_json(
        work / "report.json",
        {
            "seconds": time.perf_counter() - start,
            "cpu_s": time.process_time() - cpu,
            "imported_rss_bytes": imported,
            "peak_rss_bytes": peak_rss_bytes(),
            "weights_bytes": exported.weights_bytes,
        },
    )


if __name__ == "__main__":
    main()
