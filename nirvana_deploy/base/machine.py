"""Resource usage of this process, and the machine that a measurement was made on."""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError

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
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_THREADS = "OMP_NUM_THREADS"
"""What torch, OpenMP and numpy's BLAS start their pools by, when they are imported."""


def unix_module(name: str) -> Any:
    """A module that Python has on Unix alone, such as ``fcntl``; None on Windows."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_resource = unix_module("resource")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, since the last reset if the system supports one."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if _resource is None:
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak: int = _resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Reset the peak, so that each stage shows its own. Linux only; elsewhere the peak covers the run.

    What was freed goes back to the system first: glibc keeps it, hundreds of MB of a model that wrote text.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


def cpu_seconds() -> float:
    """CPU time of this process and its finished children."""
    return sum(_cpu_times_seconds())


def system_cpu_seconds() -> float:
    """The share of :func:`cpu_seconds` spent in the kernel, on memory pages and files."""
    return _cpu_times_seconds()[1]


def _cpu_times_seconds() -> tuple[float, float]:
    """CPU time of this process and its finished children, in programs and in the kernel."""
    if _resource is None:
        import psutil

        times = psutil.Process().cpu_times()  # Windows counts no children
        return times.user + times.children_user, times.system + times.children_system
    usage = [_resource.getrusage(who) for who in (_resource.RUSAGE_SELF, _resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime for u in usage), sum(u.ru_stime for u in usage)


def address_space_limit_bytes() -> int | None:
    """What a limit of this process (``ulimit -v``) lets it map; None without one."""
    if _resource is None:
        return None
    limit: int = _resource.getrlimit(_resource.RLIMIT_AS)[0]
    return None if limit == _resource.RLIM_INFINITY else limit


def limit_process(*, mapped_bytes: int, cpu_seconds: int) -> None:
    """Let this process map and compute no more than that, in all, where the system enforces limits."""
    limit_memory(mapped_bytes)
    if limits_are_enforced():
        _resource.setrlimit(_resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))


def limit_memory(mapped_bytes: int) -> None:
    """Let this process map no more than that, where the system enforces limits."""
    if limits_are_enforced():
        _resource.setrlimit(_resource.RLIMIT_AS, (mapped_bytes, mapped_bytes))


def limit_next_seconds(seconds: int) -> None:
    """Let this process compute that long until the next call, where the system enforces limits."""
    if limits_are_enforced():
        most = _resource.getrlimit(_resource.RLIMIT_CPU)[1]
        until = math.ceil(cpu_seconds()) + seconds
        if most == _resource.RLIM_INFINITY or until < most:
            _resource.setrlimit(_resource.RLIMIT_CPU, (until, most))


def allow_open_files(wanted: int) -> int:
    """Let this process have that many files and sockets open, as far as the system goes; returns how many."""
    if _resource is None:
        return wanted
    soft, hard = _resource.getrlimit(_resource.RLIMIT_NOFILE)
    if soft == _resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    allowed = wanted if hard == _resource.RLIM_INFINITY else min(wanted, hard)
    _resource.setrlimit(_resource.RLIMIT_NOFILE, (allowed, hard))
    return int(allowed)


def limits_are_enforced() -> bool:
    """Whether the system enforces :func:`limit_process`; macOS takes a limit on memory and forgets it."""
    return _resource is not None and sys.platform != "darwin"


def usable_cores() -> int:
    """Cores' worth of time that this process may take: its affinity, and a container's CPU quota, rounded up.

    The quota of control groups, version 2 (``cpu.max``) or 1 (``cpu.cfs_quota_us``), at any level above.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _control_groups() if (quota := _quota_cores(folder)) is not None]
    return max(1, min([allowed, *(math.ceil(quota) for quota in quotas)]))


def default_threads() -> int:
    """Physical cores that this process may use: what decode gains from, without hyper-threads.

    Fewer where OMP_NUM_THREADS says so, which torch follows as well.
    """
    import psutil

    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return min(physical, usable_threads())


def checked_threads(threads: int | None) -> int:
    """The size of a pool, :func:`default_threads` for None; raises NirvanaError unless it is positive."""
    threads = threads if threads is not None else default_threads()
    if threads < 1:
        raise NirvanaError(f"threads must be at least 1, got {threads}.")
    return threads


def keep_to_quota() -> None:
    """Let libraries that are imported later start no more threads than a container's CPU quota allows.

    They count the machine's cores. What the user set stays; without a quota nothing changes.
    """
    cores = usable_cores()
    if hasattr(os, "sched_getaffinity") and cores < len(os.sched_getaffinity(0)):
        os.environ.setdefault(_THREADS, str(cores))


def usable_threads() -> int:
    """Threads of a pool unless told otherwise: :func:`usable_cores`, or what OMP_NUM_THREADS leaves."""
    asked = os.environ.get(_THREADS, "").partition(",")[0].strip()  # a list is for nested regions
    return min(usable_cores(), int(asked)) if asked.isdigit() and int(asked) else usable_cores()


@contextmanager
def threads_for_others(threads: int) -> Iterator[None]:
    """Inside the block, let a process that is started, or what is imported, use so many threads."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def _control_groups() -> list[Path]:
    """Folders of this process's control groups that may limit its CPU time, parents included."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        roots = [_CGROUPS] if not controllers else []
        if "cpu" in controllers.split(","):
            roots = [_CGROUPS / "cpu", _CGROUPS / controllers]
        for root in roots:
            place = root / path.lstrip("/")
            found += [place, *(parent for parent in place.parents if parent.is_relative_to(root))]
    return list(dict.fromkeys(found))


def _quota_cores(folder: Path) -> float | None:
    """Cores that a control group allows; None where it sets no limit."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no limit
        return None


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
    """Memory read per second by ``threads`` threads together, in 1e9 bytes."""
    return MemoryProbe(threads).read_gb_per_s()


class MemoryProbe:
    """A block of memory beyond the caches, whose passage is timed; the best of a few passes counts.

    numpy's passes are vectorised, release the interpreter lock and start no threads.
    """

    def __init__(self, threads: int, *, passes: int = _PROBE_PASSES) -> None:
        import numpy as np

        self._threads, self._passes = threads, passes
        self._halves = np.array_split(np.ones(_PROBE_BYTES // 4, dtype=np.float32), 2)

    def read_gb_per_s(self) -> float:
        """Bytes read per second by all threads together, in 1e9."""
        import numpy as np

        chunks = [chunk for half in self._halves for chunk in np.array_split(half, self._threads)]
        return self._best(np.max, chunks)

    def copy_gb_per_s(self) -> float:
        """Bytes read and written per second by all threads together, in 1e9."""
        import numpy as np

        into, of = (np.array_split(half, self._threads) for half in self._halves)
        return self._best(np.copyto, into, of)

    def _best(self, work: Callable[..., Any], *chunks: Sequence[Any]) -> float:
        passes_s = []
        with ThreadPoolExecutor(self._threads) as pool:
            for _ in range(self._passes):
                start = time.perf_counter()
                list(pool.map(work, *chunks))
                passes_s.append(time.perf_counter() - start)
        return _PROBE_BYTES / min(passes_s) / 1e9


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16; emulated they are slower than float32."""
    import torch

    tells: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # not in every release
    able = tells()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
