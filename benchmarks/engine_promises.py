"""What builds of engines promise, whether it is kept, and whether it could be: arithmetic on measured builds.

What a build costs does not all go with its weights: a part of it is for layers, profiles and kernels, which
pruning leaves as many. Twins measure that part: random models with the layers, heads, vocabulary and form of
the dense model, and far narrower. A straight line through the costs of twins and dense model over their
weights' bytes, ``fixed + slope * weights``, gives the best that a pruned model can reach in this builder:

    bound = (fixed + slope * pruned weights) / (fixed + slope * dense weights)

as if its kernels were as many as the dense model's (a layer whose attention is decomposed has fewer, and CPU
time is noisy: a build may fall a little below). Where the bound is well above the promise, nothing that the
exporter does can keep it, and the line says from how many bytes of weights on it could be kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COST_PROMISE = 0.8
SIZE_PROMISE = 0.03
COSTS = {"cpu": "cpu_s", "memory": "peak_own_bytes", "engine": "engine_bytes"}
"""What is promised -> its field of a build's record; memory is what the system cannot drop."""


@dataclass(frozen=True)
class Line:
    """A cost over bytes of weights."""

    fixed: float
    slope: float
    """Cost of a byte of weights."""
    error: float
    """The largest distance of a measured cost from the line, as a share of the dense model's cost."""

    def ratio(self, pruned_bytes: float, dense_bytes: float) -> float:
        """Cost of a model of ``pruned_bytes`` of weights by that of one of ``dense_bytes``."""
        return (self.fixed + self.slope * pruned_bytes) / (self.fixed + self.slope * dense_bytes)

    def weights_for(self, share: float, weights_ratio: float) -> float | None:
        """Bytes of dense weights from which on ``ratio`` is at most ``share``; None when it never is."""
        if share <= weights_ratio or self.slope <= 0:
            return None
        return max(0.0, self.fixed * (1 - share) / (self.slope * (share - weights_ratio)))


def line_through(builds: Sequence[Mapping[str, Any]], cost: str) -> Line:
    """The line of least squares through builds, the dense model's the first of them."""
    weights = np.array([build["weights_bytes"] for build in builds], dtype=np.float64)
    costs = np.array([build[cost] for build in builds], dtype=np.float64)
    slope, fixed = np.polyfit(weights, costs, 1)
    error = np.abs(fixed + slope * weights - costs).max() / costs[0]
    return Line(float(fixed), float(slope), float(error))


def comparisons(builds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each pruned build against the dense one of its form, where both were built."""
    found = []
    for form in dict.fromkeys(build["form"] for build in builds):
        of_form = {b["variant"]: b for b in builds if b["form"] == form and "stopped" not in b}
        twins = [build for name, build in of_form.items() if is_twin(name)]
        for name, build in of_form.items():
            if name != "dense" and not is_twin(name) and "dense" in of_form:
                found.append(_comparison(of_form["dense"], build, twins))
    return found


def is_twin(variant: str) -> bool:
    """Whether a build is there for the line alone."""
    return variant.startswith("twin")


def _comparison(
    dense: Mapping[str, Any], pruned: Mapping[str, Any], twins: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    weights_ratio = pruned["weights_bytes"] / dense["weights_bytes"]
    ratios = {name: pruned[cost] / dense[cost] for name, cost in COSTS.items()}
    shares = {"cpu": COST_PROMISE, "memory": COST_PROMISE, "engine": weights_ratio * (1 + SIZE_PROMISE)}
    result: dict[str, Any] = {
        "form": dense["form"],
        "variant": pruned["variant"],
        "weights_ratio": weights_ratio,
        **{f"{name}_ratio": ratio for name, ratio in ratios.items()},
        "rss_ratio": pruned["peak_rss_bytes"] / dense["peak_rss_bytes"],
        "size_deviation": ratios["engine"] / weights_ratio - 1,
        "kept": {
            "cpu": ratios["cpu"] <= COST_PROMISE,
            "memory": ratios["memory"] <= COST_PROMISE,
            "engine": abs(ratios["engine"] / weights_ratio - 1) <= SIZE_PROMISE,
        },
    }
    if twins:
        lines = {name: line_through([dense, *twins], cost) for name, cost in COSTS.items()}
        sizes = (pruned["weights_bytes"], dense["weights_bytes"])
        bounds = {name: line.ratio(*sizes) for name, line in lines.items()}
        result |= {
            "bound": bounds,
            "can_be_kept": {name: bounds[name] <= share for name, share in shares.items()},
            "weights_needed_bytes": {
                name: lines[name].weights_for(share, weights_ratio) for name, share in shares.items()
            },
            "fixed": {name: line.fixed for name, line in lines.items()},
            "line_error": {name: line.error for name, line in lines.items()},
        }
    return result


def comparison_line(one: Mapping[str, Any]) -> str:
    """One comparison for people: each ratio, and what it could be at best."""
    bound = one.get("bound")

    def cell(name: str, digits: int) -> str:
        at_best = f" (at best {bound[name]:.{digits}f})" if bound else ""
        return f"{one[f'{name}_ratio']:.{digits}f}{at_best}"

    return (
        f"{one['form']:14} {one['variant']} / dense: CPU {cell('cpu', 2)}, memory {cell('memory', 2)}, "
        f"promised {COST_PROMISE}; bytes {cell('engine', 3)}, promised the weights' "
        f"{one['weights_ratio']:.3f} within {SIZE_PROMISE:.0%}, is {one['size_deviation']:+.1%}"
    )
