"""The one interface of whatever generates tokens, and the two things that are done with it.

N sequences, T tokens of a prompt, A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.reading import require_known_tokens, teacher_forced


class NoRoomError(NirvanaError):
    """A sequence would be longer than the model's context or its cache."""


class Runner(Protocol):
    """A model with a KV cache, loaded, and released at the end of its block."""

    runtime: str
    """Its name in the table."""
    threads: int
    vocab_size: int
    """V."""

    @property
    def start_token(self) -> int | None:
        """What an encoder-decoder's decoder reads first; None for a decoder, which continues its prompt."""
        ...

    def __enter__(self) -> Runner: ...

    def __exit__(self, *_: object) -> None: ...

    def prefill(
        self,
        tokens: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        answer: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], Any]:
        """Read prompts [N, T], padded where the mask [N, T] is 0, and an answer [N, A] after them.

        Returns logits [N, R, V] and a state. Their last A + 1 positions predict the answer and what follows
        it; R is A + 1 for an encoder-decoder, T + A for a decoder, or 1 where the graph gives no more.
        """
        ...

    def decode(self, tokens: NDArray[np.int64], state: Any) -> tuple[NDArray[np.float32], Any]:
        """Read one more token per sequence, [N, 1]; returns logits [N, 1, V] and the next state."""
        ...


@runtime_checkable
class OnDevice(Protocol):
    """What a runner on a device can say beyond the stop-watch."""

    def peak_device_bytes(self) -> int:
        """The most device memory taken so far."""
        ...

    def device_ms(self) -> tuple[float, ...]:
        """Compute time of every pass since the last call, on the device's own clock."""
        ...


@runtime_checkable
class Batches(Protocol):
    """A decoder whose sequences join and leave a batch between two steps."""

    def joined(self, state: Any, more: Any) -> Any:
        """The state of all sequences of two states; what it is made of is not continued any more."""
        ...

    def kept(self, state: Any, rows: Sequence[int]) -> Any:
        """The state of some sequences of a state, at least one."""
        ...


@runtime_checkable
class ReadsPrompts(Protocol):
    """An encoder-decoder whose encoder can be asked alone."""

    def encoder_states(
        self, tokens: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Prompts [N, T] to the encoder's states [N, T, D]."""
        ...


@runtime_checkable
class CountsLinears(Protocol):
    """A runner whose runtime says what it made of the graph."""

    def linears(self) -> Counter[str]:
        """Linears by the type of the weights that they compute with: i8, u4, f32, ..."""
        ...


class Lineage:
    """Which states of a cache that is written in place are still true; marks are their names, the first is 0.

    Continuing a state makes void those that followed it before.
    """

    def __init__(self) -> None:
        self._true = [0]
        self._marks = count(1)

    @property
    def newest(self) -> int:
        """The mark of the state that the cache is in."""
        return self._true[-1]

    def require(self, mark: int) -> None:
        """Raise NirvanaError when an earlier state was continued since, and this one's tokens are gone."""
        if mark not in self._true:
            raise NirvanaError(
                "This state's KV cache was written over: an earlier state of the same prompt was continued.",
                hint="Call prefill again for a second continuation that is to live beside the first.",
            )

    def advance(self, mark: int) -> int:
        """Continue the state ``mark``, if :meth:`require` lets it; returns the mark of the new state."""
        self.require(mark)
        del self._true[self._true.index(mark) + 1 :]
        self._true.append(next(self._marks))
        return self._true[-1]


def greedy_tokens(
    runner: Runner,
    prompt: NDArray[np.int64],
    *,
    max_new_tokens: int,
    eos_token_ids: frozenset[int] = frozenset(),
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Continue one prompt [1, T] greedily; returns the new ids, including a stop token if one came.

    ``on_token`` receives each id as soon as it is known.
    """
    logits, state = runner.prefill(prompt)
    new_ids: list[int] = []
    while len(new_ids) < max_new_tokens:
        token = int(logits[0, -1].argmax())
        new_ids.append(token)
        if on_token is not None:
            on_token(token)
        if token in eos_token_ids or len(new_ids) == max_new_tokens:
            break
        logits, state = runner.decode(np.array([[token]], dtype=np.int64), state)
    return new_ids


def window_logits(runner: Runner, windows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Teacher forcing: logits [N, P + 1, V]; the first P predict the last P tokens of ``windows`` [N, T].

    A decoder predicts all tokens but the first; an encoder-decoder reads the first half of a window with its
    encoder and predicts the second. A graph that gives the last logits alone returns [N, 1, V].
    """
    known = 1
    if runner.start_token is not None:
        known = teacher_forced(windows, start_token=runner.start_token)[0].shape[1]
    logits, _ = runner.prefill(windows[:, :known], answer=windows[:, known:])
    return logits


def checked_prompts(
    tokens: NDArray[np.int64],
    attention_mask: NDArray[np.int64] | None,
    answer: NDArray[np.int64] | None = None,
    *,
    vocab_size: int,
    context_tokens: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompts [N, T] with an answer [N, A] behind them, if any, and the mask of both, int64.

    Padding beyond the vocabulary of ``vocab_size`` tokens becomes token 0. Raises NirvanaError for prompts
    without tokens, with tokens beyond the vocabulary, or of more than ``context_tokens``.
    """
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise NirvanaError(f"Prompts must be an array [N, T] of at least one token, got {tokens.shape}.")
    mask = np.ones(tokens.shape, dtype=np.int64) if attention_mask is None else attention_mask
    if answer is not None:
        tokens = np.concatenate([tokens, answer], axis=1)
        mask = np.concatenate([mask, np.ones(answer.shape, dtype=np.int64)], axis=1)
    tokens = np.where(mask == 0, np.where(tokens < vocab_size, tokens, 0), tokens)
    require_known_tokens(tokens, vocab_size)
    require_context(int(mask.sum(axis=1).max()), context_tokens)
    return tokens, mask


def require_context(wanted_tokens: int, context_tokens: int | None) -> None:
    """Raise NoRoomError when a sequence is longer than the positions of the model, if they have an end."""
    if context_tokens is not None and wanted_tokens > context_tokens:
        raise NoRoomError(
            f"The model's context is {context_tokens:,} tokens, and {wanted_tokens:,} are asked for, "
            "prompt and answer together.",
            hint="Give a shorter prompt, or ask for fewer tokens.",
        )


def started(start_token: int, sequences: int, answer: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """What an encoder-decoder's decoder reads first: the start token, then the answer if any; [N, 1 + A]."""
    start = np.full((sequences, 1), start_token, dtype=np.int64)
    return start if answer is None else np.concatenate([start, answer], axis=1)
