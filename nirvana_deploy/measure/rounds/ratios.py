"""How sure the median of a few paired rounds is.

For the true median m of n independent rounds, P(x_(k) <= m <= x_(n+1-k)) = sum of C(n, i) / 2^n over
i = k .. n-k whatever their distribution, so the interval between two order statistics needs no draws and no
assumption on the noise, whose spikes fool a mean. A bootstrap of the median is narrower and covers less than
it says of so few rounds (benchmarks/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, exp, sqrt
from statistics import fmean, median, stdev

CONFIDENCE = 0.95
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Standard errors on each side of a mean that hold it with CONFIDENCE, by Student's t with 1, 2, ... degrees
of freedom. Beyond 30 the last one, which is at most 4 % too wide."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of milliseconds over paired rounds, or of a measure of quality over windows of text."""

    p50: float
    low: float
    high: float
    confidence: float
    """Of the true median being from ``low`` to ``high``: at least 0.95, less for fewer than six rounds."""

    @property
    def shows_difference(self) -> bool:
        """Whether 1 is not in the interval, which has the confidence that is asked for."""
        return self.confidence >= CONFIDENCE and not self.low <= 1 <= self.high

    @property
    def width(self) -> float:
        """The longer side of the interval as a share of the median."""
        return max(self.high - self.p50, self.p50 - self.low) / self.p50


def ratio_of(before: Sequence[float], after: Sequence[float]) -> Ratio:
    """``before`` over ``after``, milliseconds of the same rounds in the same order."""
    ratios = sorted(b / a for b, a in zip(before, after, strict=True))
    rank, confidence = _rank(len(ratios))
    return Ratio(median(ratios), ratios[rank], ratios[-1 - rank], confidence)


def ratio_of_runs(before: Sequence[float], after: Sequence[float]) -> Ratio:
    """Median of ``before`` over that of ``after``, which were measured apart and do not pair.

    Each median's interval has the root of the confidence, and both hold together with the product: wider
    than the interval of rounds in turn, and no assumption either.
    """
    medians, lows, highs, confidence = [], [], [], 1.0
    for samples in (sorted(before), sorted(after)):
        rank, covered = _rank(len(samples), sqrt(CONFIDENCE))
        medians.append(median(samples))
        lows.append(samples[rank])
        highs.append(samples[-1 - rank])
        confidence *= covered
    return Ratio(medians[0] / medians[1], lows[0] / highs[1], highs[0] / lows[1], confidence)


def ratio_of_means(log_ratios: Sequence[float]) -> Ratio | None:
    """The ratio whose logarithm is the mean of ``log_ratios``, one of each window of text, with its interval.

    ``p50`` is that mean's exponential. For a measure that is a mean itself, as a KL is: Student's interval
    of paired samples, which takes their mean to be normal and tells a difference from two samples on, where
    order statistics need six. None for a single sample, unless it shows no change at all.
    """
    mean = fmean(log_ratios)
    if len(log_ratios) < 2:
        return Ratio(1.0, 1.0, 1.0, 1.0) if mean == 0 else None
    quantile = _STUDENT[min(len(log_ratios) - 1, len(_STUDENT)) - 1]
    side = quantile * stdev(log_ratios) / sqrt(len(log_ratios))
    return Ratio(exp(mean), exp(mean - side), exp(mean + side), CONFIDENCE)


def too_few(rounds: int) -> list[str]:
    """A sentence where the order statistics of so few rounds tell no difference."""
    if _coverage(rounds, 0) >= CONFIDENCE:
        return []
    said = "1 round shows" if rounds == 1 else f"{rounds} rounds show"
    return [f"{said} no difference with a confidence of {CONFIDENCE:.0%}: six may."]


def _rank(count: int, confidence: float = CONFIDENCE) -> tuple[int, float]:
    """The innermost order statistic that still covers (counted from 0), and its confidence."""
    best = (0, _coverage(count, 0))
    for rank in range(1, count // 2):
        if _coverage(count, rank) >= confidence:
            best = (rank, _coverage(count, rank))
    return best


def _coverage(count: int, rank: int) -> float:
    return float(sum(comb(count, i) for i in range(rank + 1, count - rank)) / 2**count)
