"""Which points are on the front, and which one is recommended."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from nirvana_deploy.search.front import front, quantization_alone, recommend, worth_timing
from nirvana_deploy.search.load import loads
from nirvana_deploy.search.point import Found, Point, nothing_found
from nirvana_deploy.search.recipe import Target


def found(sparsity: float, scheme: str | None, kl: float | None, ms: float | None, size: int) -> Found:
    speedup = None if ms is None else 10 / ms
    known = nothing_found("key", Point(sparsity, scheme), "s")
    return replace(known, kl=kl, tpot_ms=ms, weights_bytes=size, speedup=speedup)


DENSE = found(0, None, 0.0, 10.0, 400)
W4 = found(0, "w4", 0.05, 4.0, 100)
CUT = found(0.2, None, 0.2, 8.0, 330)
CUT_W4 = found(0.2, "w4", 0.27, 3.5, 90)
POINTS = [DENSE, W4, CUT, CUT_W4]


@pytest.mark.parametrize("seed", range(40))
def test_no_point_of_the_front_is_beaten_and_every_other_is(seed: int) -> None:
    draw = Random(seed)
    pairs = [(draw.choice((0, 0.5, draw.random())), draw.randint(1, 9)) for _ in range(draw.randint(1, 12))]
    points = [replace(DENSE, name=str(n), kl=kl, tpot_ms=ms) for n, (kl, ms) in enumerate(pairs)]
    best = front(points, "tpot_ms")

    def beats(one: Found, other: Found) -> bool:
        assert one.kl is not None and other.kl is not None
        assert one.tpot_ms is not None and other.tpot_ms is not None
        no_worse = one.kl <= other.kl and one.tpot_ms <= other.tpot_ms
        return no_worse and (one.kl, one.tpot_ms) != (other.kl, other.tpot_ms)

    assert not [one for one in best if any(beats(other, one) for other in points)]
    shown = {(one.kl, one.tpot_ms) for one in best}
    assert all((p.kl, p.tpot_ms) in shown or any(beats(other, p) for other in best) for p in points)


def test_what_is_larger_and_loses_more_in_its_precision_is_not_timed() -> None:
    worse = found(0.4, "w4", 0.9, None, 95)
    failed = replace(worse, name="x", kl=None)
    assert [one.name for one in worth_timing([*POINTS, worse, failed])] == [one.name for one in POINTS]


def test_what_failed_its_verification_beats_no_other_and_is_taken_last() -> None:
    wrong = replace(W4, name="wrong", kl=0.01, unverified="2 of 3 linears.")
    points = [*POINTS, wrong]
    assert wrong not in front(points, "tpot_ms") and W4 in front(points, "tpot_ms")
    assert recommend(points, Target(max_kl=0.1)).point == W4
    assert recommend(points, Target(max_kl=0.02, max_weights_bytes=200)).point == wrong
    assert quantization_alone([wrong], CUT_W4) is None


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        (Target(max_kl=0.1), "dense-w4"),
        (Target(max_kl=0.3), "s0.2-w4"),
        (Target(max_weights_bytes=95), "s0.2-w4"),
        (Target(min_speedup=1.2), "dense-w4"),
        (Target(target_tpot_ms=3.6), "s0.2-w4"),
        (Target(), "dense-w4"),
    ],
)
def test_the_fastest_within_a_limit_on_quality_else_the_nearest_to_dense(target: Target, chosen: str) -> None:
    advice = recommend(POINTS, target)
    assert advice.point is not None and advice.point.name == chosen
    assert loads(advice.point, advice.target).met and advice.given == bool(target.asked)


def test_where_nothing_meets_the_budget_the_nearest_is_named() -> None:
    advice = recommend(POINTS, Target(target_tpot_ms=1.0))
    assert advice.point is None
    assert advice.nearest is not None and advice.nearest.name == "s0.2-w4"
    assert recommend([replace(DENSE, failed="no", kl=None)], Target()).nearest is None


def test_quantization_alone_is_named_where_it_beats_a_cut() -> None:
    assert quantization_alone(POINTS, CUT) == W4
    assert quantization_alone(POINTS, CUT_W4) is None  # which is faster
    assert quantization_alone(POINTS, W4) is None
    untimed = [replace(one, tpot_ms=None) for one in POINTS]
    assert quantization_alone(untimed, untimed[2]) == untimed[1]
