"""Bounds from histograms: each method against the definition that it claims."""

from __future__ import annotations

import numpy as np
import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.quantize.int8.ranges import (
    BINS,
    METHODS,
    Histogram,
    bound_of,
    entropy,
    minmax,
    mse,
    percentile,
)


def _values(outliers: int = 5) -> np.ndarray:
    generator = np.random.default_rng(1)
    values = np.abs(generator.normal(size=200_000)).astype(np.float32)
    return np.concatenate([values, np.full(outliers, 50.0, dtype=np.float32)])


def test_a_histogram_grows_without_losing_a_value() -> None:
    parts = (np.zeros((2, 3)), np.array([0.3, 0.31]), np.array([[900.0]]), np.array([0.001, 5.0]))
    histogram = Histogram.empty()
    for part in parts:
        histogram = histogram.add(part.astype(np.float32))
    assert histogram.counts.sum() == 11 and histogram.absmax == 900.0 and histogram.reach == 1024.0
    whole = np.histogram(np.concatenate([part.ravel() for part in parts]), BINS, (0, 1024.0))[0]
    np.testing.assert_array_equal(histogram.counts, whole)
    assert Histogram.empty().add(np.zeros(4, dtype=np.float32)).counts[0] == 4


def test_one_part_or_many_make_the_same_histogram() -> None:
    values = _values()
    whole = Histogram.empty().add(values)
    parts = Histogram.empty()
    for part in np.array_split(values, 17):
        parts = parts.add(part)
    np.testing.assert_array_equal(whole.counts, parts.counts)
    assert whole.absmax == parts.absmax == minmax(parts)


def test_percentile_leaves_its_share_beyond() -> None:
    values = _values(0)
    bound = percentile(Histogram.empty().add(values), 0.99)
    assert np.mean(values > bound) == pytest.approx(0.01, abs=5e-4)
    assert percentile(Histogram.empty().add(values), 1.0) == values.max()


def test_mse_is_near_the_best_bound_found_by_trying() -> None:
    values = _values()

    def error(bound: float) -> float:
        step = bound / 127
        return float(((np.clip(np.rint(values / step), -127, 127) * step - values) ** 2).mean())

    bound = mse(Histogram.empty().add(values))
    best = min(error(candidate) for candidate in np.geomspace(1, 50, 60))
    assert error(bound) <= 1.05 * best
    few = mse(Histogram.empty().add(_values(2000)))
    assert bound < few == pytest.approx(50.0)  # many outliers are worth their range


def test_entropy_cuts_a_long_thin_tail_and_keeps_a_full_range() -> None:
    assert entropy(Histogram.empty().add(_values())) < 10
    uniform = np.random.default_rng(2).uniform(0, 3.9, 400_000).astype(np.float32)
    assert entropy(Histogram.empty().add(uniform)) == pytest.approx(3.9, rel=0.02)
    assert entropy(Histogram.empty().add(np.full(9, 1e-3, dtype=np.float32))) == pytest.approx(1e-3)


def test_every_method_is_named_and_refuses_zeros() -> None:
    histogram = Histogram.empty().add(_values())
    bounds = {name: bound_of(name, histogram, of="x") for name in METHODS}
    assert bounds["minmax"] == 50.0 == max(bounds.values()) and min(bounds.values()) > 1.0
    zeros = Histogram.empty().add(np.zeros(3, dtype=np.float32))
    with pytest.raises(NirvanaError, match="activations of layer 7 are zero"):
        bound_of("minmax", zeros, of="layer 7")
    with pytest.raises(NirvanaError, match="Unknown range method"):
        bound_of("max", histogram, of="x")
