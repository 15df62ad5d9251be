"""What this process has used: CPU time and peak memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, since the last reset where the system can reset it."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Start a new peak, so that each stage shows its own; Linux only, elsewhere the peak is the run's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usage)


def system_cpu_seconds() -> float:
    """The part of :func:`cpu_seconds` that the system took: pages given and found again, files."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_stime for u in usage)
