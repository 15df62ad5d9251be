"""Resource usage of this process, and the machine that a measurement was made on."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_VERSIONS = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "onnxscript",
    "safetensors",
    "numpy",
)
_PACKAGES = ("onnxruntime", "numpy", "torch", "transformers")
_PROBE_BYTES = 1 << 28  # far beyond the last-level cache of a desktop or a server socket's share
_PROBE_PASSES = 5


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, since the last reset if the system supports one."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Reset the peak, so that each stage shows its own. Linux only; elsewhere the peak covers the run."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def cpu_seconds() -> float:
    """CPU time of this process and its finished children."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usage)


def system_cpu_seconds() -> float:
    """The share of :func:`cpu_seconds` spent in the kernel, on memory pages and files."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_stime for u in usage)


def environment() -> dict[str, Any]:
    """Machine and package versions of a run."""
    import psutil

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "logical_cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        **{package: _version(package) for package in _VERSIONS},
    }


def measured_environment(*, threads: int) -> dict[str, Any]:
    """CPU, memory, versions, load and read bandwidth; call it while the machine is idle.

    Packages are looked up, not imported; one that is not installed is None.
    """
    import psutil

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
    """The CPU's model name, or the architecture if the system doesn't tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def read_bandwidth_gb_per_s(*, threads: int) -> float:
    """Memory read per second by ``threads`` threads together, in 1e9 bytes.

    numpy.max is vectorised, releases the interpreter lock and starts no threads.
    """
    import numpy as np

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
