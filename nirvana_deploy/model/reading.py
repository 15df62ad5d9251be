"""How a model reads a window of text: the tokens that each of its stacks is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.family import Family


def first_decoder_token(config: Mapping[str, Any], *, of: str = "config.json") -> int:
    """The token that the decoder of an encoder-decoder starts from, by its parsed config.json.

    ``decoder_start_token_id``, else ``pad_token_id``; raises NirvanaError, naming ``of``, without either.
    """
    for key in ("decoder_start_token_id", "pad_token_id"):
        if isinstance(token := config.get(key), int):
            return token
    raise NirvanaError(
        f"{of} names no decoder_start_token_id and no pad_token_id: "
        "nothing says what the decoder reads first.",
        hint="Add decoder_start_token_id to its config.json, or export the checkpoint again.",
    )


def require_known_tokens(tokens: NDArray[np.int64], vocab_size: int) -> None:
    """Raise NirvanaError for token ids that a model of ``vocab_size`` rows has no embedding for."""
    if not tokens.size or (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        return
    worst = int(tokens.max()) if int(tokens.max()) >= vocab_size else int(tokens.min())
    raise NirvanaError(
        f"Token id {worst} is beyond the model's vocabulary of {vocab_size:,} rows: its tokenizer has tokens "
        "that the model never learned.",
        hint="Take the tokenizer that the model was made with, or give the model more rows in transformers: "
        "model.resize_token_embeddings(len(tokenizer))",
    )


def teacher_forced(
    windows: NDArray[np.int64], *, start_token: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(encoder input [N, T // 2], decoder input [N, T - T // 2 + 1]) of windows [N, T].

    The encoder reads the first half, the decoder the start token and the second half, so that its logits at
    every position but the last predict a token of the window. Raises NirvanaError for less than 2 tokens.
    """
    length = windows.shape[1]
    if length < 2:
        raise NirvanaError(
            f"An encoder-decoder needs windows of at least 2 tokens, got {length}.",
            hint="Pass a larger --seq-len.",
        )
    start = np.full((len(windows), 1), start_token, dtype=windows.dtype)
    return windows[:, : length // 2], np.concatenate([start, windows[:, length // 2 :]], axis=1)


def stack_tokens(
    family: Family, config: Mapping[str, Any], windows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], ...]:
    """What each stack of the family reads of windows [N, T]: a single one reads all of it."""
    if len(family.stacks) == 1:
        return (windows,)
    return teacher_forced(windows, start_token=first_decoder_token(config))


def stack_lengths(family: Family, seq_len: int) -> tuple[int, ...]:
    """Number of tokens that each stack reads of a window of ``seq_len``, as :func:`stack_tokens` does."""
    return (seq_len,) if len(family.stacks) == 1 else (seq_len // 2, seq_len - seq_len // 2 + 1)
