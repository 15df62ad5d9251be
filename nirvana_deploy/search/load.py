"""How much of a budget a point uses up.

A limit's *load* is what is measured over what is allowed: 1 at the limit. Of a perplexity ratio it is that of
the logarithms, which grow as a KL does; of a speed-up what is wanted over what is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nirvana_deploy.search.point import Found
from nirvana_deploy.search.recipe import Target


@dataclass(frozen=True)
class Loads:
    """What a point uses up of its limits: the largest of each kind, None without such a limit."""

    quality: float | None
    cost: float | None

    @property
    def most(self) -> float:
        """The largest of all; 0 without limits."""
        return max(self.quality or 0.0, self.cost or 0.0)

    @property
    def met(self) -> bool:
        """Whether every limit holds."""
        return self.most <= 1


def loads(found: Found, target: Target) -> Loads:
    """The loads of a point; what was not measured is too much."""
    quality: list[float] = []
    cost: list[float] = []
    if target.max_kl is not None:
        quality.append(_share(found.kl, target.max_kl))
    if target.max_perplexity_ratio is not None:
        ratio = max(found.perplexity_ratio or math.inf, 1.0)
        quality.append(_share(math.log(ratio), math.log(target.max_perplexity_ratio)))
    if target.target_tpot_ms is not None:
        cost.append(_share(found.tpot_ms, target.target_tpot_ms))
    if target.min_speedup is not None:
        cost.append(math.inf if not found.speedup else target.min_speedup / found.speedup)
    if target.max_weights_bytes is not None:
        cost.append(_share(found.weights_bytes, target.max_weights_bytes))
    return Loads(max(quality, default=None), max(cost, default=None))


def _share(value: float | None, limit: float) -> float:
    if value is None:
        return math.inf
    return value / limit if limit else (math.inf if value > 0 else 0.0)
