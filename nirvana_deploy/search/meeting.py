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
    used = {one.sparsity: loads(one, target) for one in trials}
    by_cost = used[0.0].cost is not None
    known = {s: (load.cost if by_cost else load.quality) or 0.0 for s, load in used.items()}
    if len(trials) > MOST_TRIALS or any(_in_band(s, load) for s, load in known.items()):
        return None
    if by_cost:
        if known[0.0] <= 1:
            return None  # the dense model meets it
        below = max(s for s, load in known.items() if load > 1)
        above = min((s for s, load in known.items() if load <= 1), default=None)
    else:
        if known[0.0] > 1:
            return None  # quantization alone is too much
        below = max(s for s, load in known.items() if load <= 1)
        above = min((s for s, load in known.items() if load > 1), default=None)
    end = most if above is None else above
    if above is not None and below >= above:  # noise: it is not monotone here
        return None
    if end - below < _STEP:
        return None
    wanted = _by_line(known, below, above, most) if by_cost else _by_power(known, below, above)
    margin = 0.0 if above is None else _MARGIN * (end - below)
    tried = round(min(max(wanted, below + max(margin, _STEP / 2)), end - margin), 4)
    return None if tried in known else tried


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
