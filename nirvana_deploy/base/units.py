"""Numbers with units, for people: three digits, and never a zero for what is not zero.

Bytes use decimal units (1 MB = 10^6 bytes), as disks and downloads do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal

MINUS = "\N{MINUS SIGN}"
_HOURS_FROM_S = 6000
"""A hundred minutes."""
_SIZE = re.compile(r"(\d+\.?\d*|\.\d+) ?(?:([kmgt])(i?))?(b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def format_number(value: float, *, digits: int = 3) -> str:
    """Format with ``digits`` significant digits, never in exponent form: 0.0123, 12.3, 1,234.

    Digits left of the point are always kept: 1234 is 1,234 with any ``digits``.
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    exponent = int(f"{abs(value):.{digits - 1}e}".split("e")[1])
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", MINUS)


def _scaled(value: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        # 999.5 would round up to "1,000" of this unit
        if abs(value) < 999.5:
            return f"{format_number(value)} {unit}".rstrip()
        value /= 1000
    return f"{format_number(value)} {units[-1]}"


def format_bytes(value_bytes: float) -> str:
    """Bytes in decimal units with three digits: 512 B, 11.5 kB, 538 MB."""
    return _scaled(value_bytes, ("B", "kB", "MB", "GB", "TB"))


def bytes_of(text: str) -> int:
    """The size that "300MB", "300M" (10^6 bytes each) or "300MiB" (2^20) stands for.

    Raises ValueError for anything else; for a number without a unit it says so.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no size: write 300MB, 2GB, or 512MiB for powers of 1024.")
    number, power, binary, byte = found.groups(default="")
    if not (power or byte):
        raise ValueError(f"{text} has no unit: write {text}MB, {text}MiB, or {text}B for bytes.")
    size = Decimal(number) * (1024 if binary else 1000) ** _POWERS[power.lower()]
    return int(size)


def typed_bytes(size_bytes: int) -> str:
    """A size as :func:`bytes_of` reads it back, not rounded: 300MB, 1MiB, 1234567B."""
    for power, letter in ((3, "G"), (2, "M"), (1, "k")):
        for base, unit in ((1000, f"{letter}B"), (1024, f"{letter.upper()}iB")):
            if size_bytes and size_bytes % base**power == 0:
                return f"{size_bytes // base**power}{unit}"
    return f"{size_bytes}B"


def format_count(count: float) -> str:
    """A large count with three digits: 960, 46.1 k, 135 M, 8.03 B."""
    return _scaled(count, ("", "k", "M", "B"))


def format_ms(value_ms: float) -> str:
    """Milliseconds, or seconds from one second on: 0.420 ms, 21.3 ms, 1.23 s."""
    return f"{format_number(value_ms)} ms" if value_ms < 999.5 else format_seconds(value_ms / 1000)


def format_seconds(value_s: float) -> str:
    """A duration: 0.04 s, 12.3 s, 2 min 05 s, 1 h 45 min."""
    if value_s < 0.01:
        return "< 0.01 s"
    if value_s < 1:
        return f"{value_s:.2f} s"
    if value_s < 99.95:
        return f"{format_number(value_s)} s"
    minutes, seconds = divmod(round(value_s), 60)
    if value_s < _HOURS_FROM_S:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(round(value_s / 60), 60)
    return f"{hours:,} h {minutes:02d} min"


def format_share(share: float) -> str:
    """A fraction as a percentage with one decimal: 40.0%."""
    return f"{share * 100:.1f}%".replace("-", MINUS)
