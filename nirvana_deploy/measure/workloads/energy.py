"""Energy of the processor, from the counters of RAPL that Linux shows below /sys/class/powercap.

They count microjoules of a whole package (and of its memory, if told apart), whoever used them, and begin
again at ``max_energy_range_uj``. Most systems let only the administrator read them. Source: the kernel's
Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_ZONES = "intel-rapl:*"
"""AMD's counters have this name too; intel-rapl-mmio:* are the same ones again."""
_COUNTED = ("package-", "dram")
"""Beginnings of zones' names. Others (core, uncore) are part of a package, or hold several (psys)."""


class EnergyMeter:
    """Reads the counters of the packages and their memory."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._ranges: dict[Path, int] = {}
        names = []
        for zone in sorted(root.glob(_ZONES)):
            name, most = _text(zone / "name"), _number(zone / "max_energy_range_uj")
            if name.startswith(_COUNTED) and most is not None and _number(zone / "energy_uj") is not None:
                self._ranges[zone] = most
                names.append(name)
        self.zones = tuple(names)
        """What is counted, for example ``package-0``; empty where nothing can be read."""

    def read(self) -> dict[Path, int] | None:
        """The counters now, in microjoules; None where they cannot be read."""
        found = {zone: _number(zone / "energy_uj") for zone in self._ranges}
        known = {zone: value for zone, value in found.items() if value is not None}
        return known if known and len(known) == len(found) else None

    def joules(self, before: Mapping[Path, int] | None, after: Mapping[Path, int] | None) -> float | None:
        """What was used between two readings; a counter that is lower has begun again once."""
        if before is None or after is None:
            return None
        used = 0
        for zone, most in self._ranges.items():
            step = after[zone] - before[zone]
            used += step if step >= 0 else step + most
        return used / 1e6


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None
