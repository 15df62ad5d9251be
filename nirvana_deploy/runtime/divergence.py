"""KL divergence in numpy, and that of a quantized folder from its float one on a few windows.

Choices are made by the latter; a report's figures come from ``measure/quality.py``, on other text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError

Float = TypeVar("Float", np.float32, np.float64)
_MAX_WINDOWS, _MAX_TOKENS = 8, 128
_BLOCK_TOKENS = 64
Logits = Callable[[NDArray[np.int64]], Iterable[NDArray[np.float32]]]
"""Windows [N, T] to the logits [T', V] of each."""


class Yardstick:
    """The float logits of a few windows, held in memory: at most 8 windows of 128 tokens.

    Raises NirvanaError for a graph that gives none.
    """

    def __init__(
        self,
        logits: Logits,
        windows: NDArray[np.int64],
        *,
        max_windows: int = _MAX_WINDOWS,
        max_tokens: int = _MAX_TOKENS,
    ) -> None:
        self.windows = windows[:max_windows, :max_tokens]
        self._float = [found.copy() for found in logits(self.windows)]
        if not any(map(len, self._float)):
            raise NirvanaError(
                f"The float model gives no logits for windows of {self.windows.shape[1]} tokens: its graph "
                "is damaged.",
                hint="Export it again: nirvana-deploy export CHECKPOINT --out DIR",
            )

    def divergence(self, logits: Logits) -> float:
        """Mean over all positions of KL(float || quantized), nats; raises NirvanaError when not finite."""
        total, count = 0.0, 0
        for found, reference in zip(logits(self.windows), self._float, strict=True):
            for start in range(0, len(reference), _BLOCK_TOKENS):
                block = slice(start, start + _BLOCK_TOKENS)
                log_p = log_softmax(reference[block])
                terms = kl_terms(log_p, np.exp(log_p), log_softmax(found[block]))
                total += float(terms.sum(dtype=np.float64))
            count += len(reference)
        if not np.isfinite(total):
            raise NirvanaError("The logits of the float or the quantized model are NaN or infinite.")
        return total / count


def log_softmax(logits: NDArray[Float]) -> NDArray[Float]:
    """Log-probabilities of logits [T, V], in their own precision."""
    shifted: NDArray[Float] = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def kl_terms(log_p: NDArray[Float], p: NDArray[Float], log_q: NDArray[Float]) -> NDArray[Float]:
    """p (log p - log q) of log-probabilities [T, V]: their sum over V is KL(p || q), in nats.

    ``p`` is exp(log p): one reference serves several q.
    """
    terms: NDArray[Float] = log_p - log_q
    terms *= p
    return terms
