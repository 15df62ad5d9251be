"""Bounds of a static quantizer from histograms of absolute values; a bound b is the grid b/127 {-127..127}.

``minmax`` clips nothing, ``percentile`` a share of 1e-4, ``entropy`` minimizes the KL divergence of the
quantized histogram [TensorRT's calibrator, S. Migacz, GTC 2017], ``mse`` the expected squared error. The last
three clip the few huge activations of an LLM's first token, on which all later tokens depend: ``minmax`` is
the default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.registry import look_up

LEVELS = 127
"""Steps on each side of zero."""
BINS = 4096
_PERCENTILE = 0.9999
_MSE_BOUNDS = 96
_ENTROPY_STRIDE = 16


@dataclass(frozen=True)
class Histogram:
    """Absolute values seen so far, in equal bins from 0 to ``reach``; grows by halving its resolution."""

    counts: NDArray[np.int64]
    """[BINS]."""
    reach: float
    """Upper end of the last bin; a power of two, or 0 while nothing but zeros was seen."""
    absmax: float
    """Largest value, exactly."""

    @classmethod
    def empty(cls) -> Histogram:
        """Nothing seen."""
        return cls(counts=np.zeros(BINS, dtype=np.int64), reach=0.0, absmax=0.0)

    def add(self, values: NDArray[np.float32]) -> Histogram:
        """With the finite, nonnegative ``values`` of any shape counted too."""
        absmax = max(self.absmax, float(values.max(initial=0.0)))
        if absmax == 0.0:
            counts = self.counts.copy()
            counts[0] += values.size
            return Histogram(counts=counts, reach=0.0, absmax=0.0)
        reach = self.reach or float(2.0 ** np.ceil(np.log2(absmax)))
        counts = self.counts
        while reach < absmax:
            counts = np.concatenate([counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            reach *= 2
        bins = np.minimum((values.ravel() * np.float32(BINS / reach)).astype(np.int32), BINS - 1)
        return Histogram(counts=counts + np.bincount(bins, minlength=BINS), reach=reach, absmax=absmax)

    @property
    def width(self) -> float:
        """Of one bin."""
        return self.reach / BINS

    @property
    def centers(self) -> NDArray[np.floating[Any]]:
        """[BINS]: the middles of the bins."""
        return (np.arange(BINS, dtype=np.float64) + 0.5) * self.width


def minmax(histogram: Histogram) -> float:
    """The largest value."""
    return histogram.absmax


def percentile(histogram: Histogram, share: float = _PERCENTILE) -> float:
    """The end of the bin up to which ``share`` of the values lie, at most the largest value."""
    reached = np.cumsum(histogram.counts) >= share * histogram.counts.sum()
    return min((int(np.argmax(reached)) + 1) * histogram.width, histogram.absmax)


def mse(histogram: Histogram) -> float:
    """Of bounds spaced evenly in logarithm between the largest value and 1/127 of it, the best."""
    bounds = histogram.absmax * np.geomspace(1 / LEVELS, 1, _MSE_BOUNDS)
    values, counts = histogram.centers, histogram.counts.astype(np.float64)
    used = counts > 0
    values, counts = values[used], counts[used]
    steps = bounds[:, None] / LEVELS
    # inside: the variance of a uniform rounding error, as a bin is wider than a step where it matters less
    inside = np.minimum(steps**2 / 12, values**2)
    beyond = (values - bounds[:, None]) ** 2
    errors = (np.where(values <= bounds[:, None], inside, beyond) * counts).sum(axis=1)
    return float(bounds[np.argmin(errors)])


def entropy(histogram: Histogram) -> float:
    """The bound of least KL(values clipped to it || values quantized within it)."""
    last = int(np.flatnonzero(histogram.counts)[-1]) + 1
    ends = np.arange(LEVELS + 1, last, _ENTROPY_STRIDE)
    candidates = [*ends, last] if last > LEVELS else []
    if not candidates:
        return histogram.absmax
    counts = histogram.counts.astype(np.float64)
    divergences = [_divergence(counts, int(end)) for end in candidates]
    return min(int(candidates[int(np.argmin(divergences))]) * histogram.width, histogram.absmax)


def _divergence(counts: NDArray[np.float64], end: int) -> float:
    """KL of the first ``end`` bins (what is beyond counted in the last) from their 128-level form."""
    inside = counts[:end]
    reference = inside.copy()
    reference[-1] += counts[end:].sum()
    level = np.arange(end) * (LEVELS + 1) // end
    filled = inside > 0
    sums = np.bincount(level, weights=inside, minlength=LEVELS + 1)
    occupied = np.bincount(level, weights=filled, minlength=LEVELS + 1)
    quantized = np.where(filled, (sums / np.maximum(occupied, 1))[level], 0.0)
    p, q = reference / reference.sum(), quantized / max(quantized.sum(), 1.0)
    seen = p > 0
    smallest = 1e-4 / max(counts.sum(), 1.0)  # where clipping moved mass to a bin that was empty
    return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], smallest))).sum())


METHODS: Mapping[str, Callable[[Histogram], float]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def bound_of(method: str, histogram: Histogram, *, of: str) -> float:
    """The bound of a linear's activations, positive; raises NirvanaError naming the linear ``of`` if not."""
    if histogram.absmax <= 0:
        raise NirvanaError(
            f"All calibration activations of {of} are zero: a range cannot be taken from them.",
            hint="Calibrate on text of the kind that the model is for (--calib FILE).",
        )
    return look_up(method, METHODS, what="range method")(histogram)
