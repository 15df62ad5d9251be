"""What else the machine did while something was timed, and whether it stayed the same machine.

Between rounds: the cores that other programs took, the time that a hypervisor took away, the clock, and the
milliseconds of a small fixed product, which slow down when the processor does; and what memory gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import MemoryProbe, default_threads
from nirvana_deploy.base.progress import SILENT, Progress

BUSY_CORES = 0.15
"""Taken by others on average: above this a round is likely to have been disturbed."""
_STOLEN_SHARE, _DRIFT_SHARE, _CLOCK_SHARE, _MEMORY_SHARE = 0.02, 0.05, 0.1, 0.3
_IDLE_SECONDS = 5.0
_KERNEL_SIZE, _KERNEL_PASSES = 256, 5


@dataclass(frozen=True)
class Sample:
    """The machine since the sample before, and now."""

    seconds: float
    others_cores: float
    """Cores' worth of time that went to other programs, the kernel's work for them included."""
    stolen_share: float
    """Of the time of all cores, taken away by a hypervisor; 0 where the system does not tell."""
    kernel_ms: float
    """Best of a few passes of a product of two float32 matrices of 256 by 256."""
    clock_mhz: float | None
    """None where the system does not tell."""
    read_gb_per_s: float | None = None
    """What memory gives now, if it was asked."""


@dataclass(frozen=True)
class Times:
    """CPU seconds since some moment."""

    at: float
    busy: float
    """Of all cores, by all programs."""
    stolen: float
    own: float
    """By this process and those it started, also where they have ended."""
    cores: int


class Watch:
    """Takes samples between rounds."""

    def __init__(
        self,
        times: Callable[[], Times] | None = None,
        kernel_ms: Callable[[], float] | None = None,
        read_gb_per_s: Callable[[], float] | None = None,
    ) -> None:
        self._times, self._kernel_ms = times or machine_times, kernel_ms or _kernel_ms
        self._read_gb_per_s = read_gb_per_s
        self._last = self._times()
        self.samples: list[Sample] = []

    def sample(self) -> Sample:
        """Look at the machine; its own work is not counted as anybody's."""
        now, last = self._times(), self._last
        seconds = max(now.at - last.at, 1e-9)
        others = max(0.0, (now.busy - last.busy) - (now.own - last.own)) / seconds
        stolen = max(0.0, now.stolen - last.stolen) / (seconds * now.cores)
        reads = None if self._read_gb_per_s is None else self._read_gb_per_s()
        self.samples.append(Sample(seconds, others, stolen, self._kernel_ms(), _clock_mhz(), reads))
        self._last = self._times()
        return self.samples[-1]

    def record(self) -> dict[str, Any]:
        """The samples, and ``cautions``: what makes the timings doubtful, the worst first."""
        return {"samples": [asdict(one) for one in self.samples], "cautions": cautions(self.samples)}


def machine_watch(threads: int | None = None) -> Watch:
    """A watch that also asks what memory gives to so many threads [those of a runtime by default]."""
    return Watch(read_gb_per_s=MemoryProbe(threads or default_threads(), passes=2).read_gb_per_s)


def cautions(samples: Sequence[Sample]) -> list[str]:
    """Sentences on a machine that was busy, or did not stay the same; empty for a quiet one."""
    if not samples:
        return []
    total = sum(one.seconds for one in samples)
    others = sum(one.seconds * one.others_cores for one in samples) / total
    stolen = sum(one.seconds * one.stolen_share for one in samples) / total
    found = []
    if others > BUSY_CORES:
        found.append(
            f"The machine was busy: other programs took {others:.1f} cores on average while this was "
            "measured. Milliseconds are too long; ratios, from rounds in turn, suffer less. "
            "Measure again on an idle machine: --wait-until-idle."
        )
    if stolen > _STOLEN_SHARE:
        found.append(f"The host took {stolen:.0%} of this virtual machine's time away.")
    third = len(samples) // 3
    if third:
        first = median(one.kernel_ms for one in samples[:third])
        last = median(one.kernel_ms for one in samples[-third:])
        if abs(last / first - 1) > _DRIFT_SHARE:
            found.append(
                f"The machine drifted: a fixed product took {first:.2f} ms at first, {last:.2f} ms at last."
            )
    speeds = [one.read_gb_per_s for one in samples if one.read_gb_per_s]
    if speeds and min(speeds) < (1 - _MEMORY_SHARE) * max(speeds):
        found.append(f"Memory gave between {min(speeds):.1f} and {max(speeds):.1f} GB/s, round by round.")
    clocks = [one.clock_mhz for one in samples if one.clock_mhz]
    if clocks and min(clocks) < (1 - _CLOCK_SHARE) * max(clocks):
        found.append(f"The clock went between {min(clocks):,.0f} and {max(clocks):,.0f} MHz.")
    return found


def wait_until_idle(
    *,
    max_minutes: float,
    progress: Progress = SILENT,
    watch: Watch | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return when others have left the machine alone for some seconds; NirvanaError when they do not."""
    watch, waited = watch or Watch(), 0.0
    while True:
        sleep(_IDLE_SECONDS)
        waited += _IDLE_SECONDS
        taken = watch.sample().others_cores
        if taken <= BUSY_CORES:
            return
        if waited >= 60 * max_minutes:
            raise NirvanaError(
                f"Other programs still take {taken:.1f} cores after {max_minutes:g} minutes.",
                hint="Stop them, or wait longer: --max-minutes N.",
            )
        progress.note(f"Waiting: other programs take {taken:.1f} cores")


def machine_times() -> Times:
    """What the operating system says now."""
    import psutil

    of_all = psutil.cpu_times()
    idle = of_all.idle + getattr(of_all, "iowait", 0.0)
    stolen = getattr(of_all, "steal", 0.0)
    counted_twice = getattr(of_all, "guest", 0.0) + getattr(of_all, "guest_nice", 0.0)
    own, process = 0.0, psutil.Process()
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            used = one.cpu_times()
            own += used.user + used.system + used.children_user + used.children_system
    return Times(
        time.perf_counter(),
        sum(of_all) - idle - stolen - counted_twice,
        stolen,
        own,
        psutil.cpu_count() or 1,
    )


def _clock_mhz() -> float | None:
    import psutil

    try:
        found = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return None
    return float(found.current) if found is not None and found.current else None


def _kernel_ms() -> float:
    matrix = np.ones((_KERNEL_SIZE, _KERNEL_SIZE), dtype=np.float32)
    best = float("inf")
    for _ in range(_KERNEL_PASSES):
        start = time.perf_counter()
        np.dot(matrix, matrix)
        best = min(best, time.perf_counter() - start)
    return 1e3 * best
