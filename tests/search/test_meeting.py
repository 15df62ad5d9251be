"""A budget is met by few trials, whatever the curve of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from nirvana_deploy.search.load import loads
from nirvana_deploy.search.meeting import BAND, MOST_TRIALS, best_of, nearest_of, next_sparsity, shortfall
from nirvana_deploy.search.point import Found, Point, nothing_found
from nirvana_deploy.search.recipe import Target

MOST = 0.8


def tried(measure: Callable[[float], dict[str, float]], target: Target) -> list[Found]:
    """The dense model, and every cut that is tried."""

    def found(sparsity: float) -> Found:
        return replace(nothing_found("", Point(sparsity), ""), **measure(sparsity))  # type: ignore[arg-type]

    trials = [found(0.0)]
    while (sparsity := next_sparsity(trials, target, most=MOST)) is not None:
        assert 0 < sparsity <= MOST and sparsity not in {one.sparsity for one in trials}
        trials.append(found(sparsity))
        assert len(trials) <= MOST_TRIALS + 1
    return trials


@pytest.mark.parametrize("seed", range(100))
def test_a_limit_on_kl_is_met_within_the_band(seed: int) -> None:
    draw = Random(seed)
    power, factor, limit = draw.uniform(0.8, 3), draw.uniform(0.3, 5), draw.uniform(0.06, 1)
    base = draw.choice((0.0, 0.02))
    target = Target(max_kl=limit)
    trials = tried(lambda s: {"kl": base + factor * s**power}, target)
    chosen = best_of(trials, target)
    assert chosen is not None and chosen.kl is not None
    within = (1 - BAND) * limit <= chosen.kl <= limit
    assert within or chosen.sparsity == MOST
    assert len(trials) <= 6


@pytest.mark.parametrize("seed", range(60))
def test_a_limit_on_time_is_met_by_the_least_cut(seed: int) -> None:
    draw = Random(seed)
    falls, limit = draw.uniform(0.3, 0.95), draw.uniform(7, 19)
    target = Target(target_tpot_ms=limit)
    trials = tried(lambda s: {"tpot_ms": 20 * (1 - falls * s)}, target)
    chosen = best_of(trials, target)
    if 20 * (1 - falls * MOST) > limit:
        assert chosen is None and nearest_of(trials, target).sparsity == MOST
    else:
        assert chosen is not None and chosen.tpot_ms is not None
        assert (1 - BAND) * limit <= chosen.tpot_ms <= limit


def test_a_perplexity_ratio_is_met_on_a_logarithm() -> None:
    target = Target(max_perplexity_ratio=1.2)
    chosen = best_of(tried(lambda s: {"perplexity_ratio": math.exp(2 * s**1.4)}, target), target)
    assert chosen is not None and chosen.perplexity_ratio is not None
    assert 1.2 ** (1 - BAND) <= chosen.perplexity_ratio <= 1.2


def test_a_cut_that_removes_nothing_is_none() -> None:
    """Of a model whose first unit costs more than is allowed."""
    target = Target(max_kl=0.01)
    trials = tried(lambda s: {"kl": s if s > 0.1 else 0.0, "weights_bytes": 90 if s > 0.1 else 100}, target)
    assert min(one.sparsity for one in trials[1:]) < 0.1 and best_of(trials, target) is None
    assert nearest_of(trials, target).sparsity > 0.1


@pytest.mark.parametrize(
    ("measured", "target"),
    [({"kl": 0.5}, Target(max_kl=0.1)), ({"tpot_ms": 5.0}, Target(target_tpot_ms=9.0))],
)
def test_where_the_dense_model_decides_nothing_is_tried(measured: dict[str, float], target: Target) -> None:
    assert len(tried(lambda s: measured, target)) == 1


def test_a_curve_that_is_not_monotone_ends(noise: float = 0.3) -> None:
    target = Target(max_kl=0.2)
    trials = tried(lambda s: {"kl": s + noise * math.sin(40 * s) ** 2}, target)
    assert len(trials) <= MOST_TRIALS + 1


@pytest.mark.parametrize(
    ("kls", "said"),
    [
        (
            {0.399: 0.1, 0.4: 0.4},
            r"takes 50% of the budget, .*: between 0\.399 and 0\.4 no other unit goes\.",
        ),
        ({MOST: 0.08}, r"takes 40% .*: 0\.8 is the largest sparsity that this model and recipe allow\."),
        ({0.2: 0.4, 0.3: 0.1}, r"takes 50% .*: measured loads are not monotone around 0\.2\."),
        (
            {0.3: 0.1, **{0.5 + n / 100: 0.4 for n in range(8)}},
            r"8 cuts were tried, .* between 0\.3 and 0\.5\.",
        ),
    ],
)
def test_what_is_farther_from_its_limit_than_the_band_says_how_far_and_why(
    kls: dict[float, float], said: str
) -> None:
    target = Target(max_kl=0.2)
    trials = [replace(nothing_found("", Point(s), ""), kl=kl) for s, kl in {0.0: 0.0, **kls}.items()]
    assert next_sparsity(trials, target, most=MOST) is None
    chosen = best_of(trials, target)
    assert chosen is not None
    told = shortfall(trials, chosen, target, most=MOST)
    assert told is not None and re.search(said, told), told


def test_units_that_are_coarser_than_the_band_are_said() -> None:
    target = Target(max_kl=0.35)
    trials = tried(lambda s: {"kl": 0.1 * (s // 0.1), "weights_bytes": 100 - s // 0.1}, target)
    chosen = best_of(trials, target)
    assert chosen is not None
    told = shortfall(trials, chosen, target, most=MOST)
    assert told is not None and told.startswith("It takes 86% of the budget, and none that takes 95%")


def test_what_is_within_the_band_says_nothing() -> None:
    target = Target(max_kl=0.2)
    trials = tried(lambda s: {"kl": s}, target)
    chosen = best_of(trials, target)
    assert chosen is not None and shortfall(trials, chosen, target, most=MOST) is None


def test_limits_of_both_kinds_are_both_looked_at() -> None:
    target = Target(max_kl=0.1, min_speedup=1.5)
    trials = tried(lambda s: {"kl": s, "speedup": 1 / (1 - 0.8 * s)}, target)
    assert best_of(trials, target) is None  # fast enough is too far from dense
    fast = [one for one in trials if (loads(one, target).cost or 2) <= 1]
    assert fast and all((loads(one, target).quality or 0) > 1 for one in fast)
