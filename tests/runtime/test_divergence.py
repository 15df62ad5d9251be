"""The yardstick of quantization: the mean KL divergence of the float model from the quantized one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.runtime.divergence import Yardstick

WINDOWS = np.zeros((2, 70), dtype=np.int64)  # more tokens than are compared at once


def answering(logits: NDArray[np.float32]) -> Callable[[NDArray[np.int64]], Iterator[NDArray[np.float32]]]:
    """A model with these logits [N, T, V]."""
    return lambda windows: iter(logits[: len(windows), : windows.shape[1]])


def test_the_divergence_is_the_mean_of_p_log_p_over_q_with_p_the_float_model() -> None:
    random = np.random.default_rng(0)
    floats, rounded = random.normal(scale=2, size=(2, *WINDOWS.shape, 5)).astype(np.float32)
    p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in (floats, rounded))
    found = Yardstick(answering(floats), WINDOWS).divergence(answering(rounded))
    assert found == pytest.approx((p * np.log(p / q)).sum(axis=-1).mean(), rel=1e-5)
    assert Yardstick(answering(floats), WINDOWS).divergence(answering(floats)) == 0


def test_at_most_so_many_windows_and_tokens_are_read() -> None:
    yardstick = Yardstick(answering(np.zeros((9, 200, 5), np.float32)), np.zeros((9, 200), np.int64))
    assert yardstick.windows.shape == (8, 128)


def test_logits_that_are_not_finite_are_refused() -> None:
    yardstick = Yardstick(answering(np.zeros((*WINDOWS.shape, 5), np.float32)), WINDOWS)
    with pytest.raises(NirvanaError, match="NaN or infinite"):
        yardstick.divergence(answering(np.full((*WINDOWS.shape, 5), np.nan, np.float32)))


def test_a_graph_without_logits_is_damaged() -> None:
    with pytest.raises(NirvanaError, match=r"no logits for windows of 70 tokens.*\n.*export CHECKPOINT"):
        Yardstick(answering(np.zeros((2, 0, 5), np.float32)), WINDOWS)
