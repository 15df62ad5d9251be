"""The sparsity that meets a budget, by trying some. Pure numbers.

Loads (``load.py``) of quality grow with the sparsity, about as a power of it above what quantization alone
costs; those of time and size fall, about linearly from the dense model's. The next sparsity is where that
law, through what was measured, comes to the middle of the wanted band, and inside what is known to be too
little and too much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nirvana_deploy.search.load import loads
from nirvana_deploy.search.point import Found
from nirvana_deploy.search.recipe import Target

BAND = 0.05
"""A load of 1 to so much less is met."""
MOST_TRIALS = 8
_POWER = 1.5
"""Of the sparsity in a load of quality, before two were measured."""
_FIRST_BY_QUALITY = 0.2
_STEP = 0.002
"""Sparsities closer than this cut the same units, or nearly."""
_MARGIN = 0.1
"""Share of the interval between too little and too much where no trial is made, on each side."""


def next_sparsity(trials: Sequence[Found], target: Target, *, most: float) -> float | None:
    """The next sparsity to try, at most ``most``; None where trials end: it is met, or cannot be.

    ``trials`` are points of one precision, that of sparsity 0 first. With limits of both kinds the sparsity
    is the least that meets those on time and size.
    """
    by_cost, known = _known(trials, target)
    if any(_in_band(s, load) for s, load in known.items()) or _decided_by_dense(known, by_cost=by_cost):
        return None
    below, above = _around(known, by_cost=by_cost)
    end = most if above is None else above
    if _why_ended(len(trials), below, above, end) is not None:
        return None
    wanted = _by_line(known, below, above, most) if by_cost else _by_power(known, below, above)
    margin = 0.0 if above is None else _MARGIN * (end - below)
    tried = round(min(max(wanted, below + max(margin, _STEP / 2)), end - margin), 4)
    return None if tried in known else tried


def shortfall(trials: Sequence[Found], chosen: Found, target: Target, *, most: float) -> str | None:
    """How far from its limit ``chosen`` of :func:`best_of` is, and why no trial is nearer.

    None for one within the band.
    """
    by_cost, known = _known(trials, target)
    load = known[chosen.sparsity]
    if _in_band(chosen.sparsity, load):
        return None
    below, above = _around(known, by_cost=by_cost)
    end = most if above is None else above
    why = _why_ended(len(trials), below, above, end) or f"{below:g} and {end:g} were the nearest two tried"
    return f"It takes {load:.0%} of the budget, and none that takes {1 - BAND:.0%} or more was found: {why}."


def _known(trials: Sequence[Found], target: Target) -> tuple[bool, dict[float, float]]:
    """Whether time or size decides, and the load that decides by sparsity."""
    used = {one.sparsity: loads(one, target) for one in trials}
    by_cost = used[0.0].cost is not None
    return by_cost, {s: (load.cost if by_cost else load.quality) or 0.0 for s, load in used.items()}


def _decided_by_dense(known: dict[float, float], *, by_cost: bool) -> bool:
    """Whether the dense model meets a limit on time and size, or quantization alone is too much."""
    return known[0.0] <= 1 if by_cost else known[0.0] > 1


def _around(known: dict[float, float], *, by_cost: bool) -> tuple[float, float | None]:
    """The largest sparsity before the limit is crossed, and the least behind it, if any."""
    before = [s for s, load in known.items() if (load > 1) == by_cost]
    behind = [s for s, load in known.items() if (load > 1) != by_cost]
    return max(before), min(behind, default=None)


def _why_ended(trials: int, below: float, above: float | None, end: float) -> str | None:
    """Why no further sparsity is tried; None where one may be."""
    if above is not None and below >= above:
        return f"measured loads are not monotone around {above:g}"
    if end - below < _STEP:
        if above is None:
            return f"{end:g} is the largest sparsity that this model and recipe allow"
        return f"between {below:g} and {above:g} no other unit goes"
    if trials > MOST_TRIALS:
        return f"{MOST_TRIALS} cuts were tried, which is the most, and it lies between {below:g} and {end:g}"
    return None


def best_of(trials: Sequence[Found], target: Target) -> Found | None:
    """Of the trials that meet every limit the one to take: for time and size the least cut, else the most.

    None where no cut meets them, and where the dense model, the first of ``trials``, needs none. A cut that
    is as large as the dense model removed no unit, and is none.
    """
    met = [one for one in trials if _is_cut(one, trials[0]) and loads(one, target).met]
    dense = loads(trials[0], target).cost
    by_cost = dense is not None
    if dense is not None and dense <= 1:
        return None  # there is nothing to cut for
    pick = min if by_cost else max
    return pick(met, key=lambda one: one.sparsity, default=None)


def nearest_of(trials: Sequence[Found], target: Target) -> Found:
    """The cut whose largest load is least; ``trials`` are those of :func:`best_of`."""
    cuts = [one for one in trials if _is_cut(one, trials[0])] or trials[1:]
    return min(cuts, key=lambda one: loads(one, target).most)


def _is_cut(found: Found, dense: Found) -> bool:
    smaller = None in (found.weights_bytes, dense.weights_bytes) or found.weights_bytes != dense.weights_bytes
    return found.sparsity > 0 and smaller


def _in_band(sparsity: float, load: float) -> bool:
    return sparsity > 0 and 1 - BAND <= load <= 1


def _by_line(known: dict[float, float], below: float, above: float | None, most: float) -> float:
    """Where the line through two points comes to the middle of the band."""
    aim = 1 - BAND / 2
    if above is None:
        others = [s for s in known if s < below]
        if not others:
            return min(0.3, most)
        above, below = below, max(others)
    fall = known[below] - known[above]
    return most if fall <= 0 else below + (known[below] - aim) * (above - below) / fall


def _by_power(known: dict[float, float], below: float, above: float | None) -> float:
    """Where load = base + a s^b through what was measured comes to the middle of the band."""
    base, aim = known[0.0], 1 - BAND / 2
    cut = sorted(s for s in known if s > 0 and known[s] > base)
    if not cut:
        return _FIRST_BY_QUALITY if below == 0 else 2 * below
    nearest = sorted(cut, key=lambda s: abs(math.log((known[s] - base) / max(aim - base, 1e-9))))[:2]
    one = nearest[0]
    power = _POWER
    if len(nearest) > 1:
        rise = math.log((known[one] - base) / (known[nearest[1]] - base)) / math.log(one / nearest[1])
        power = min(max(rise, 0.7), 4.0)
    return float(one * (max(aim - base, 1e-9) / (known[one] - base)) ** (1 / power))
