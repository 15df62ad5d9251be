"""What the ONNX export costs: CPU seconds, wall seconds and peak memory, in a process of its own.

    python benchmarks/export_cost.py OUT [--repeats 3] [--json FILE]

OUT is a folder that `nirvana-deploy prune-export` made (its checkpoint/ is exported), or any checkpoint
folder. The costs are those of the whole process, the imports of torch and transformers included, which
are also given alone. Set beside them are the promises: at most 12 s of CPU and, at the peak, at most
twice the model's bytes in the export dtype plus 600 MB. Exits with 1 when one is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nirvana_deploy.artifact import read_json, write_json
from nirvana_deploy.measure.environment import measured_environment
from nirvana_deploy.model.shape import shape_from_config

CPU_PROMISE_S = 12.0
PEAK_PROMISE_PER_MODEL_BYTE = 2
PEAK_PROMISE_EXTRA_BYTES = 600_000_000
EXPORT_DTYPE_BYTES = 4

_EXPORT = """
import json, sys, time
from pathlib import Path
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
imports_cpu_s = time.process_time()
onnx_from_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
print(json.dumps({"imports_cpu_s": imports_cpu_s}))
"""


def export_cost(checkpoint: Path) -> dict[str, float]:
    """Export ``checkpoint`` once to a temporary folder, in a new process, and weigh that process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _EXPORT, str(checkpoint), str(Path(folder) / "onnx")]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # unlike getrusage, of this child alone
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"The export of {checkpoint} failed with exit code {process.returncode}.")
    return {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": wall_s,
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        **json.loads(said),
    }


def main() -> None:
    """Measure, print a table, and say whether the promises hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    checkpoint = options.out / "checkpoint" if (options.out / "checkpoint").is_dir() else options.out

    shape = shape_from_config(read_json(checkpoint / "config.json"))
    model_bytes = EXPORT_DTYPE_BYTES * (shape.linear_parameters + shape.embedding_parameters)
    peak_promise_bytes = PEAK_PROMISE_PER_MODEL_BYTE * model_bytes + PEAK_PROMISE_EXTRA_BYTES
    environment = measured_environment(threads=os.cpu_count() or 1)
    samples = [export_cost(checkpoint) for _ in range(options.repeats)]
    median: dict[str, float] = {
        key: sorted(sample[key] for sample in samples)[len(samples) // 2] for key in samples[0]
    }
    kept = median["cpu_s"] <= CPU_PROMISE_S and median["peak_rss_bytes"] <= peak_promise_bytes

    print(f"Export of {checkpoint}, {model_bytes / 1e6:.0f} MB of weights, median of {len(samples)}:")
    imports_s = median["imports_cpu_s"]
    print(f"  CPU   {median['cpu_s']:7.2f} s  (promise {CPU_PROMISE_S:.0f} s; imports {imports_s:.2f} s)")
    print(f"  wall  {median['wall_s']:7.2f} s")
    print(f"  peak  {median['peak_rss_bytes'] / 1e6:7.0f} MB (promise {peak_promise_bytes / 1e6:.0f} MB)")
    print("Promises kept." if kept else "A promise is broken.")
    if options.json:
        record: dict[str, Any] = {
            "schema": 1,
            "environment": environment,
            "model_bytes": model_bytes,
            "promise": {"cpu_s": CPU_PROMISE_S, "peak_rss_bytes": peak_promise_bytes, "kept": kept},
            "median": median,
            "samples": samples,
        }
        write_json(options.json, record)
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
