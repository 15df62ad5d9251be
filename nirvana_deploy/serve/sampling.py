"""The next token of an answer from its logits [V]: greedy, or drawn as a request asks.

Penalties first, then temperature, top-k and top-p, in the order of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MOST_LIKELY = 256
"""Tokens that usually hold the whole nucleus: sorting the vocabulary takes milliseconds."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 0
    """0 is no limit."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that were read or written, and multiplies negative ones."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of written tokens."""
    frequency_penalty: float = 0.0
    """Likewise, once for every time."""
    seed: int | None = None


class Sampler:
    """Draws the tokens of one answer, and remembers them for its penalties."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._how = sampling
        self._seen = set(prompt)
        self._written: dict[int, int] = {}
        self._random = np.random.default_rng(None if sampling.seed is None else sampling.seed % 2**64)

    def next(self, logits: NDArray[np.float32]) -> int:
        """The next token by logits [V], which are left alone."""
        penalized = self._penalized(logits)
        token = int(penalized.argmax()) if self._how.temperature == 0 else self._drawn(penalized)
        self._seen.add(token)
        self._written[token] = self._written.get(token, 0) + 1
        return token

    def _penalized(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        how = self._how
        penalized = logits
        if how.repetition_penalty != 1.0:
            seen = np.fromiter(self._seen, dtype=np.int64)
            penalized = logits.copy()
            of_seen = logits[seen]
            penalized[seen] = np.where(
                of_seen > 0, of_seen / how.repetition_penalty, of_seen * how.repetition_penalty
            )
        if (how.presence_penalty or how.frequency_penalty) and self._written:
            penalized = penalized.copy() if penalized is logits else penalized
            tokens = np.fromiter(self._written, dtype=np.int64)
            times = np.fromiter(self._written.values(), dtype=np.int64)
            penalized[tokens] -= (how.presence_penalty + how.frequency_penalty * times).astype(np.float32)
        return penalized

    def _drawn(self, logits: NDArray[np.float32]) -> int:
        how = self._how
        if how.top_k == 1:
            return int(logits.argmax())
        tokens = _largest(logits, how.top_k) if 0 < how.top_k < len(logits) else np.arange(len(logits))
        below = logits[tokens].astype(np.float64) - float(logits.max())
        with np.errstate(over="ignore"):  # the least temperatures leave the most likely token alone
            shares = np.exp(below / how.temperature)
        shares /= shares.sum()
        if how.top_p < 1:
            kept = _nucleus(shares, how.top_p)
            tokens, shares = tokens[kept], shares[kept] / shares[kept].sum()
        return int(self._random.choice(tokens, p=shares))


def _largest(values: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest values, in no order."""
    return np.argpartition(values, -count)[-count:]


def _nucleus(shares: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Indices of the fewest shares whose sum reaches ``top_p``, the largest first."""
    for count in (_MOST_LIKELY, len(shares)):
        some = _largest(shares, count) if count < len(shares) else np.arange(len(shares))
        order = some[np.argsort(-shares[some], kind="stable")]
        sums = np.cumsum(shares[order])
        if sums[-1] >= top_p or count >= len(shares):
            break
    return order[: int(np.searchsorted(sums, top_p)) + 1]
