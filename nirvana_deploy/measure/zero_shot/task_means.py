"""Means over tasks with their standard errors, and differences of paired examples.

With scores x_ti of examples i of tasks t = 1..T, the mean is (1/T) sum_t mean_i x_ti and its standard error
(1/T) sqrt(sum_t var_i(x_ti) / n_t): every task counts alike. A difference is the same of x_ti - y_ti: two
models that fail on the same examples differ by less than their own errors say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Scores = Mapping[str, Sequence[float]]
"""Task -> the score of each example."""


def task_means(variants: Mapping[str, Scores]) -> dict[str, Any]:
    """Return ``baseline``, the first variant's name, and ``variants``: name -> its mean and standard error.

    Beside them stand ``difference`` from the baseline and its standard error, None for the baseline itself.
    A standard error is None where a task has one example.
    """
    baseline, first = next(iter(variants.items()))
    return {
        "baseline": baseline,
        "tasks": list(first),
        "variants": {
            name: _summary(scores, None if scores is first else first) for name, scores in variants.items()
        },
    }


def _summary(scores: Scores, baseline: Scores | None) -> dict[str, float | None]:
    value, error = mean_over_tasks(scores)
    difference, difference_error = None, None
    if baseline is not None:
        paired = {task: np.subtract(x, baseline[task]).tolist() for task, x in scores.items()}
        difference, difference_error = mean_over_tasks(paired)
    return {
        "mean": value,
        "standard_error": error,
        "difference": difference,
        "difference_standard_error": difference_error,
    }


def mean_over_tasks(scores: Scores) -> tuple[float, float | None]:
    """The mean of the tasks' means, and its standard error, None where a task has one example."""
    means = [float(np.mean(x)) for x in scores.values()]
    if any(len(x) < 2 for x in scores.values()):
        return float(np.mean(means)), None
    variances = [float(np.var(x, ddof=1)) / len(x) for x in scores.values()]
    return float(np.mean(means)), float(np.sqrt(np.sum(variances))) / len(variances)
