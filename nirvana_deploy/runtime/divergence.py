"""KL divergence of a quantized folder from its float one, on a few windows: what choices are made by.

The figures of a report come from ``measure/quality.py``, on text that had no part in any choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError

_MAX_WINDOWS, _MAX_TOKENS = 8, 128
_BLOCK_TOKENS = 64
Logits = Callable[[NDArray[np.int64]], Iterable[NDArray[np.float32]]]
"""Windows [N, T] to the logits [T', V] of each."""


class Yardstick:
    """The float logits of a few windows, held in memory: at most 8 windows of 128 tokens."""

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

    def divergence(self, logits: Logits) -> float:
        """Mean over all positions of KL(float || quantized), nats; raises NirvanaError when not finite."""
        total, count = 0.0, 0
        for found, reference in zip(logits(self.windows), self._float, strict=True):
            for start in range(0, len(reference), _BLOCK_TOKENS):
                block = slice(start, start + _BLOCK_TOKENS)
                log_p, log_q = _log_softmax(reference[block]), _log_softmax(found[block])
                total += float((np.exp(log_p) * (log_p - log_q)).sum(dtype=np.float64))
            count += len(reference)
        if not np.isfinite(total):
            raise NirvanaError("The logits of the float or the quantized model are NaN or infinite.")
        return total / count


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted: NDArray[np.float32] = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
