"""Means over tasks: every task counts alike, and differences are paired."""

from __future__ import annotations

import numpy as np
import pytest

from nirvana_deploy.measure.zero_shot.task_means import mean_over_tasks, task_means


def test_the_standard_error_is_that_of_simulated_means() -> None:
    random = np.random.default_rng(0)
    rates, sizes = (0.3, 0.8), (40, 160)

    def draw() -> dict[str, list[float]]:
        return {
            str(rate): (random.random(size) < rate).astype(float).tolist()
            for rate, size in zip(rates, sizes, strict=True)
        }

    found = np.array([mean_over_tasks(draw()) for _ in range(2000)], dtype=float)
    assert found[:, 0].mean() == pytest.approx(0.55, abs=0.003)
    assert np.median(found[:, 1]) == pytest.approx(found[:, 0].std(), rel=0.05)


def test_a_difference_is_paired_by_example() -> None:
    dense, pruned = [1.0, 0.0] * 50, [1.0, 0.0] * 49 + [0.0, 0.0]  # one example of a hundred is lost
    means = task_means({"dense": {"a": dense}, "pruned": {"a": pruned}})
    assert means["baseline"] == "dense" and means["tasks"] == ["a"]
    assert means["variants"]["dense"]["difference"] is None
    found = means["variants"]["pruned"]
    assert found["mean"] == 0.49 and found["difference"] == pytest.approx(-0.01)
    assert found["difference_standard_error"] == pytest.approx(0.01) and found["standard_error"] > 0.05


def test_one_example_has_no_standard_error() -> None:
    assert mean_over_tasks({"a": [1.0], "b": [0.0, 1.0]}) == (0.75, None)
