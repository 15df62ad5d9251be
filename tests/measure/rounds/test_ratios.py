"""The interval of a median covers what it says, and tells a slow-down from noise."""

from __future__ import annotations

import numpy as np
import pytest

from nirvana_deploy.measure.rounds.ratios import (
    CONFIDENCE,
    Ratio,
    ratio_of,
    ratio_of_means,
    ratio_of_runs,
)


def noisy(random: np.random.Generator, rounds: int) -> np.ndarray:
    """Milliseconds with a spread of 3 %, every seventh round disturbed by something else."""
    spikes = (random.random(rounds) < 1 / 7) * random.exponential(0.5, rounds)
    return 10 * np.exp(0.03 * random.standard_normal(rounds)) * (1 + spikes)


def share(slower: float, rounds: int) -> float:
    """Of 400 benchmarks, how many show a difference between two models, one of them ``slower``."""
    random = np.random.default_rng(7)
    found = [ratio_of(slower * noisy(random, rounds), noisy(random, rounds)) for _ in range(400)]
    return float(np.mean([ratio.shows_difference for ratio in found]))


@pytest.mark.parametrize("rounds", [6, 11, 21, 41])
def test_the_same_model_twice_is_seldom_found_different(rounds: int) -> None:
    assert share(1.0, rounds) <= 1 - CONFIDENCE + 0.02


def test_a_model_slower_by_a_twentieth_is_found_with_enough_rounds() -> None:
    assert share(1.05, 41) >= 0.95
    assert share(1.05, 11) < share(1.05, 21) < share(1.05, 41)


@pytest.mark.parametrize(
    ("rounds", "low", "high", "confidence"),
    [(2, 1, 2, 0.5), (5, 1, 5, 1 - 2 / 2**5), (6, 1, 6, 1 - 2 / 2**6), (11, 2, 10, 1 - 24 / 2**11)],
)
def test_the_order_statistics_are_the_exact_ones(
    rounds: int, low: float, high: float, confidence: float
) -> None:
    found = ratio_of(range(1, rounds + 1), [1] * rounds)
    assert found == Ratio((rounds + 1) / 2, low, high, pytest.approx(confidence))
    assert found.width == pytest.approx((high - found.p50) / found.p50)


def test_few_rounds_show_nothing() -> None:
    assert not ratio_of([20, 21, 22], [1, 1, 1]).shows_difference
    assert ratio_of([20.0] * 6, [1.0] * 6).shows_difference


@pytest.mark.parametrize("rounds", [7, 11, 21])
def test_two_runs_of_one_model_are_hardly_ever_found_different(rounds: int) -> None:
    random = np.random.default_rng(7)
    found = [ratio_of_runs(noisy(random, rounds), noisy(random, rounds)) for _ in range(400)]
    assert all(ratio.confidence >= CONFIDENCE for ratio in found)
    assert np.mean([ratio.shows_difference for ratio in found]) <= 1 - CONFIDENCE


def test_a_run_slower_by_a_tenth_is_found_though_rounds_do_not_pair() -> None:
    random = np.random.default_rng(7)
    found = [ratio_of_runs(1.1 * noisy(random, 41), noisy(random, 41)) for _ in range(400)]
    assert np.mean([ratio.shows_difference for ratio in found]) >= 0.95
    assert ratio_of_runs([3.0, 1.0, 2.0], [1.0, 1.0]).p50 == 2
    assert not ratio_of_runs([20.0] * 6, [1.0] * 6).shows_difference


@pytest.mark.parametrize("windows", [*range(2, 33), 100])
def test_the_interval_of_a_mean_is_students(windows: int) -> None:
    """Its quantile against the integral of the density, on logarithms with a mean of 0 and an error of 1."""
    logs = np.array([-1.0, 1.0] * (windows // 2) + [0.0] * (windows % 2))
    logs *= np.sqrt(windows) / logs.std(ddof=1)
    found = ratio_of_means(logs.tolist())
    assert found is not None and found.p50 == pytest.approx(1) and found.low == pytest.approx(1 / found.high)
    freedom = windows - 1
    angles = np.linspace(-np.pi / 2, np.pi / 2, 200_001)  # t = sqrt(freedom) tan(angle)
    density = np.cos(angles) ** (freedom - 1)
    inside = np.abs(np.sqrt(freedom) * np.tan(angles)) <= np.log(found.high)
    covered = density[inside].sum() / density.sum()
    assert CONFIDENCE - 2e-4 <= covered <= CONFIDENCE + (1e-2 if windows > 31 else 2e-4)


def test_a_single_window_tells_nothing() -> None:
    assert ratio_of_means([0.1]) is None
    assert ratio_of_means([0.0]) == Ratio(1.0, 1.0, 1.0, 1.0)
