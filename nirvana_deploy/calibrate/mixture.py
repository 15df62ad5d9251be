"""Mixtures of calibration text: sources with shares, and how windows are divided among them.

``a,b:0.3`` is a mixture, because one part has a share; ``a`` gets what is left. ``a,b`` is a list to choose
from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError

MIX = "mix"
"""The name of the mixture for those who give no text."""

MIX_OF_WRITERS = "prose:0.3,self:0.3,pydoc:0.2,code:0.2"
"""``mix`` for models that write text."""
MIX_AT_HAND = "prose:0.6,pydoc:0.2,code:0.2"
"""``mix`` for models that do not, or where there is no model."""

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Part:
    """A source and its share of the windows, in (0, 1]."""

    source: str
    share: float


@dataclass(frozen=True)
class _Written:
    """A part as it was typed; without a share it gets what the others leave."""

    source: str
    share: float | None


def sources_of(calib: str) -> tuple[str, ...]:
    """The sources to choose among: one mixture as soon as a part has a share, else every part of the list.

    A file may have commas and colons in its name. Raises NirvanaError where nothing is named.
    """
    written = _written(calib)
    if not written:
        raise NirvanaError(f"--calib {calib!r} names no text.", hint="For instance: --calib pydoc,notes.txt")
    if any(part.share is not None for part in written):
        return (calib,)
    return tuple(dict.fromkeys(part.source for part in written))


def files_of(calib: str) -> tuple[Path, ...]:
    """The files that ``calib`` names, if any."""
    paths = (Path(part.source).expanduser() for part in _written(calib))
    return tuple(path for path in paths if path.is_file())


def parts_of(calib: str, *, writes_text: bool) -> tuple[Part, ...]:
    """The parts of a mixture, whose shares add up to 1; anything else is one source.

    ``mix`` is expanded, with the model's own text where it ``writes_text``. Raises NirvanaError for shares
    outside (0, 1] or with another sum, and for a part that is named twice.
    """
    if calib == MIX:
        calib = MIX_OF_WRITERS if writes_text else MIX_AT_HAND
    written = _written(calib)
    if all(part.share is None for part in written):
        return (Part(calib.strip(), 1.0),)
    _refuse_bad_parts(calib, written)
    given = sum(part.share for part in written if part.share is not None)
    open_parts = sum(part.share is None for part in written)
    left = 1 - given
    if abs(left) > _TOLERANCE if not open_parts else left <= _TOLERANCE:
        missing = [part.source for part in written if part.share is None]
        rest = f", which leaves nothing for {' and '.join(missing)}" if missing else ", not to 1"
        raise NirvanaError(
            f"--calib {calib}: the shares {_listed(written)} add up to {given:.7g}{rest}.",
            hint=_instead(written),
        )
    return tuple(
        Part(part.source, left / open_parts if part.share is None else part.share) for part in written
    )


def split_by_share(total: int, shares: Sequence[float]) -> list[int]:
    """Divide ``total`` windows by share, largest remainders first; one each at least, if they suffice."""
    quotas = [total * share for share in shares]
    counts = [math.floor(quota + _TOLERANCE) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda part: counts[part] - quotas[part])
    for part in by_remainder[: total - sum(counts)]:
        counts[part] += 1
    while 0 in counts and total >= len(counts):
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def interleaved(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Order windows (part, index in part) so that every prefix has about the shares of the whole."""
    windows = [(part, index) for part, count in enumerate(counts) for index in range(count)]
    return sorted(windows, key=lambda window: ((window[1] + 0.5) / counts[window[0]], window[0]))


def _written(calib: str) -> list[_Written]:
    if calib.strip() and Path(calib).exists():  # nothing is the working folder to Path
        return [_Written(calib, None)]
    return [_part_written(piece.strip()) for piece in calib.split(",") if piece.strip()]


def _part_written(piece: str) -> _Written:
    """A number after the last colon is a share; what else follows one belongs to a path."""
    source, colon, share = piece.rpartition(":")
    if not (colon and source) or Path(piece).exists():
        return _Written(piece, None)
    try:
        return _Written(source.strip(), float(share))
    except ValueError:
        return _Written(piece, None)


def _refuse_bad_parts(calib: str, written: Sequence[_Written]) -> None:
    sources = [part.source for part in written]
    if MIX in sources:
        raise NirvanaError(
            f"--calib {calib}: {MIX!r} is a mixture itself and cannot be a part of another.",
            hint=f"Name its parts, which are {MIX_OF_WRITERS}.",
        )
    for source in sources:
        if sources.count(source) > 1:
            raise NirvanaError(f"--calib {calib} names {source} twice.", hint="Name each part once.")
    for part in written:
        if part.share is not None and not 0 < part.share <= 1:
            raise NirvanaError(
                f"--calib {calib}: the share of {part.source} must be above 0 and at most 1, got "
                f"{part.share:g}.",
                hint=_instead(written),
            )


def _listed(written: Sequence[_Written]) -> str:
    return ", ".join(f"{part.source} {part.share:g}" for part in written if part.share is not None)


def _instead(written: Sequence[_Written]) -> str:
    """The same parts in the same proportions; the last one gets what is left, so that the sum is 1."""
    usable = [part.share for part in written if part.share is not None and 0 < part.share < math.inf]
    usual = sum(usable) / len(usable) if usable else 1.0
    weights = [part.share if part.share in usable else usual for part in written]
    total = sum(weight or usual for weight in weights)
    scaled = [
        f"{part.source}:{(weight or usual) / total:.3g}"
        for part, weight in zip(written, weights, strict=True)
    ]
    return f"For instance: --calib {','.join([*scaled[:-1], written[-1].source])}"
