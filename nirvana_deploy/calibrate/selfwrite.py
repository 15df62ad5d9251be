"""Calibration text written by the model itself, for use without data.

Sampled at temperature 1 from the full distribution: the model's own estimate of what it will see. Each window
is its own document. The same seed gives the same tokens on the same machine; across machines
rounding may tip a sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Advance, Progress
from nirvana_deploy.model.checkpoint import Checkpoint

BATCH_SIZE = 64
"""Windows per batch; constant, since the batch decides which random number goes where. A token of SmolLM2
costs about half the CPU time that it costs in batches of 16."""

_NEUTRAL_STARTS = ("The", "In", "A", "I", "What", "To", "1", "\n")


def written_by_model(
    checkpoint: Checkpoint, *, shapes: dict[int, tuple[int, int]], progress: Progress = SILENT
) -> dict[int, NDArray[np.int64]]:
    """Write windows of the requested shape for each random stream.

    ``shapes`` maps a stream (any non-negative integer: the seed of its random numbers) to (N, T); the result
    maps it to int64 tokens [N, T]. Different streams are independent. The model is loaded once, in fp32.
    Raises NirvanaError for an encoder-decoder.
    """
    family = checkpoint.shape.family
    if not family.writes_text:
        raise NirvanaError(
            f"--calib self: only a decoder-only model writes its own calibration text, not {family.name}.",
            hint="Pass --calib pydoc or a text file.",
        )
    model, tokenizer = checkpoint.load(), checkpoint.tokenizer
    starts = _start_tokens(tokenizer)
    steps = sum(-(-count // BATCH_SIZE) * length for count, length in shapes.values())
    with progress.task("Writing calibration text", steps) as advance:
        windows = {}
        for stream, (count, length) in shapes.items():
            generator = torch.Generator().manual_seed(stream)
            batches = [
                _sample(
                    model,
                    starts,
                    min(BATCH_SIZE, count - done),
                    length,
                    tokenizer.eos_token_id,
                    generator,
                    advance,
                )
                for done in range(0, count, BATCH_SIZE)
            ]
            windows[stream] = torch.cat(batches).numpy() if batches else np.empty((0, length), np.int64)
    return windows


def _start_tokens(tokenizer: Any) -> torch.Tensor:
    """First tokens that commit to little: BOS and common one-token words, int64 [S]."""
    encoded = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in _NEUTRAL_STARTS]
    starts = [ids[0] for ids in encoded if len(ids) == 1]
    if tokenizer.bos_token_id is not None:
        starts.insert(0, tokenizer.bos_token_id)
    return torch.tensor(starts or [0])


@torch.inference_mode()
def _sample(
    model: Any,
    starts: torch.Tensor,
    count: int,
    length: int,
    eos_token_id: int | None,
    generator: torch.Generator,
    advance: Advance,
) -> torch.Tensor:
    """Sample int64 tokens [count, length]; after an early EOS another text begins."""

    def fresh() -> torch.Tensor:
        return starts[torch.randint(len(starts), (count,), generator=generator)]

    tokens = [fresh()]
    advance(1)
    cache = None
    while len(tokens) < length:
        output = model(input_ids=tokens[-1][:, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = output.logits[:, -1].softmax(dim=-1)
        sampled = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        ended = tokens[-1] == (-1 if eos_token_id is None else eos_token_id)
        tokens.append(torch.where(ended, fresh(), sampled))
        advance(1)
    return torch.stack(tokens, dim=1)
