"""Greedy generation with anything that has prefill and decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Decoder(Protocol):
    """A decoder with a KV cache; N sequences, T tokens, V vocabulary."""

    def prefill(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], Any]:
        """[N, T] tokens to logits [N, T, V] and a state."""
        ...

    def decode(self, tokens: NDArray[np.int64], state: Any) -> tuple[NDArray[np.float32], Any]:
        """[N, 1] tokens to logits [N, 1, V] and the next state."""
        ...


def greedy_tokens(
    decoder: Decoder,
    tokens: NDArray[np.int64],
    *,
    max_new_tokens: int,
    eos_token_ids: frozenset[int] = frozenset(),
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Continue one prompt [1, T] greedily; returns the new ids, a stop token included when one came.

    ``on_token`` hears each id as soon as it is known.
    """
    logits, state = decoder.prefill(tokens)
    new_ids: list[int] = []
    while len(new_ids) < max_new_tokens:
        token = int(logits[0, -1].argmax())
        new_ids.append(token)
        if on_token is not None:
            on_token(token)
        if token in eos_token_ids or len(new_ids) == max_new_tokens:
            break
        logits, state = decoder.decode(np.array([[token]], dtype=np.int64), state)
    return new_ids
