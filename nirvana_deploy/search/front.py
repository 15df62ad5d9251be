"""Which points are worth a look, and which one to take. Pure numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from nirvana_deploy.search.load import loads
from nirvana_deploy.search.point import Found
from nirvana_deploy.search.recipe import Target

USUAL = Target(max_kl=0.1)
"""Where no budget is given: about what careful quantization to four bits costs."""
Cost = Literal["tpot_ms", "weights_bytes"]


def front(points: Iterable[Found], cost: Cost) -> list[Found]:
    """The verified points that none beats in KL and ``cost``, ascending in cost; of equals the first."""
    known = [one for one in points if _sound(one) and getattr(one, cost) is not None]
    best, least = [], float("inf")
    for found in sorted(known, key=lambda one: (getattr(one, cost), one.kl)):
        assert found.kl is not None
        if found.kl < least:
            best.append(found)
            least = found.kl
    return best


def worth_timing(points: Sequence[Found]) -> list[Found]:
    """The points on the front of KL and size, and the dense model in float, which the others are compared to.

    Decoding reads the weights of a model once for each token, so a larger file with a larger loss does not
    come out ahead; between schemes it may, so each has its own front.
    """
    chosen = {one.name for one in points if one.name == "dense"}
    for scheme in {one.scheme for one in points}:
        chosen |= {one.name for one in front((p for p in points if p.scheme == scheme), "weights_bytes")}
    return [one for one in points if one.name in chosen and one.kl is not None]


@dataclass(frozen=True)
class Recommendation:
    """The point to take."""

    point: Found | None
    """None where no point meets the target."""
    nearest: Found | None
    """What comes nearest then."""
    target: Target
    given: bool
    """Whether the user gave the target."""


def recommend(points: Sequence[Found], target: Target) -> Recommendation:
    """The fastest point within a limit on quality; else the one of least KL within those on time and size.

    Points that were not timed count by their size. One that failed its verification is taken only where no
    other meets the target.
    """
    given = bool(target.asked)
    target = target if given else USUAL
    measured = [one for one in points if one.failed is None and one.kl is not None]
    within = [one for one in measured if loads(one, target).met]
    verified = [one for one in within if _sound(one)]
    chosen = min(verified or within, key=_quickest if target.on_quality else _truest, default=None)
    nearest = None if chosen else min(measured, key=lambda one: loads(one, target).most, default=None)
    return Recommendation(chosen, nearest, target, given)


def quantization_alone(points: Sequence[Found], chosen: Found) -> Found | None:
    """A quantized dense model that is no slower than a ``chosen`` cut and no farther from the dense one."""
    if not chosen.sparsity or chosen.kl is None:
        return None
    for one in points:
        if one.sparsity == 0 and one.scheme and _sound(one) and (one.kl or 0.0) <= chosen.kl:
            if one.tpot_ms is not None and chosen.tpot_ms is not None:
                if one.tpot_ms <= chosen.tpot_ms:
                    return one
            elif (one.weights_bytes or 0) <= (chosen.weights_bytes or 0):
                return one
    return None


def _sound(found: Found) -> bool:
    """Whether it was measured, and passed its verification."""
    return found.kl is not None and found.unverified is None


def _quickest(found: Found) -> tuple[float, float, float]:
    slow = found.tpot_ms if found.tpot_ms is not None else float("inf")
    return slow, float(found.weights_bytes or 0), found.kl or 0.0


def _truest(found: Found) -> tuple[float, ...]:
    return (found.kl or 0.0, *_quickest(found)[:2])
