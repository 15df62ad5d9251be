"""The machine and the versions behind a measurement, so that a number can be judged later."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

_PACKAGES = ("onnxruntime", "numpy", "torch", "transformers")
_PROBE_BYTES = 1 << 28  # far beyond the last-level cache of a desktop or a server socket's share
_PROBE_PASSES = 5


def measured_environment(*, threads: int) -> dict[str, Any]:
    """CPU, memory, versions, load and read bandwidth; call it before anything else loads the machine.

    Packages are looked up, not imported; one that is not installed is None.
    """
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_name(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "load_average_1min": load_average,
        "memory_bandwidth_gb_per_s": round(read_bandwidth_gb_per_s(threads=threads), 2),
        "memory_bandwidth_method": (
            f"best of {_PROBE_PASSES} passes of numpy.max over {_PROBE_BYTES >> 20} MiB of float32, "
            f"{threads} threads"
        ),
    }


def cpu_name() -> str:
    """The CPU's model name, or the architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def read_bandwidth_gb_per_s(*, threads: int) -> float:
    """Memory that ``threads`` threads together read per second, in 1e9 bytes.

    numpy.max is vectorised, releases the interpreter lock and starts no threads of its own.
    """
    chunks = np.array_split(np.ones(_PROBE_BYTES // 4, dtype=np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        passes_s = []
        for _ in range(_PROBE_PASSES):
            start = time.perf_counter()
            list(pool.map(np.max, chunks))
            passes_s.append(time.perf_counter() - start)
    return _PROBE_BYTES / min(passes_s) / 1e9


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
