"""Calibration text written by the model itself, for use without data.

Windows begin with the first words of texts of many kinds (``openings.py``) and go on with what the model
samples from the nucleus of its distribution; those that repeat earlier ones are written anew. The same seed
gives the same tokens on the same machine; across machines rounding may tip a sample.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import cpu_multiplies_bfloat16
from nirvana_deploy.base.progress import SILENT, Advance, Progress
from nirvana_deploy.calibrate.openings import OPENINGS
from nirvana_deploy.model.checkpoint import Checkpoint

BATCH_SIZE = 64
"""Windows per batch; constant, since the batch decides which random number goes where. A token of SmolLM2
costs about half the CPU time that it costs in batches of 16."""

_RUN_TOKENS, _MOST_SHARED = 8, 0.5
"""A window of which more than this share of runs of so many tokens stands in earlier ones repeats them."""
_MOST_AGAIN = 2
"""Windows written in all, in times of those asked for, before repetitions are taken."""
_NUCLEUS = 0.95
"""Sampled from the likeliest tokens with this probability together (Holtzman et al., arXiv 1904.09751): from
the full distribution a small model soon writes what is no language (benchmarks/NOTES.md)."""
_CANDIDATES = 256
"""At most so many of them; sorting a whole vocabulary takes as long as the model."""


def written_by_model(
    checkpoint: Checkpoint, *, shapes: dict[int, tuple[int, int]], progress: Progress = SILENT
) -> dict[int, NDArray[np.int64]]:
    """Write windows of the requested shape for each random stream.

    ``shapes`` maps a stream (any non-negative integer: the seed of its random numbers) to (N, T); the result
    maps it to int64 tokens [N, T]. Different streams are independent. The model is loaded once, in float32,
    or in bfloat16 where the CPU multiplies that. Raises NirvanaError for an encoder-decoder.
    """
    family = checkpoint.shape.family
    if not family.writes_text:
        raise NirvanaError(
            f"--calib self: only a decoder-only model writes its own calibration text, not {family.name}.",
            hint="Pass --calib pydoc or a text file.",
        )
    dtype = torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32
    model, tokenizer = checkpoint.load(dtype=dtype), checkpoint.tokenizer
    openings = _openings(tokenizer)
    steps = sum(-(-count // BATCH_SIZE) * length for count, length in shapes.values())
    with progress.task("Writing calibration text", steps) as advance:
        windows = {}
        for stream, (count, length) in shapes.items():
            generator = torch.Generator().manual_seed(stream)
            sample = partial(
                _sample,
                model,
                openings,
                length=length,
                eos_token_id=tokenizer.eos_token_id,
                generator=generator,
            )
            found = np.concatenate(
                [
                    np.empty((0, length), np.int64),
                    *(
                        sample(min(BATCH_SIZE, count - done), advance=advance).numpy()
                        for done in range(0, count, BATCH_SIZE)
                    ),
                ]
            )

            def more(missing: int, sample: Callable[[int], torch.Tensor] = sample) -> NDArray[np.int64]:
                written: NDArray[np.int64] = sample(missing).numpy()
                return written

            windows[stream], dropped = _distinct(found, more)
            if dropped:
                progress.note(f"{dropped} of {count} windows that the model wrote repeated others")
    return windows


def repeating(windows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of windows [N, T] repeat earlier ones: in whole, or most of their runs of 8 tokens."""
    size = min(_RUN_TOKENS, windows.shape[1])
    known: set[bytes] = set()
    found = np.zeros(len(windows), dtype=bool)
    for number, window in enumerate(windows):
        runs = [run.tobytes() for run in np.lib.stride_tricks.sliding_window_view(window, size)]
        found[number] = sum(run in known for run in runs) > _MOST_SHARED * len(runs)
        if not found[number]:
            known.update(runs)
    return found


def _distinct(
    windows: NDArray[np.int64], write: Callable[[int], NDArray[np.int64]]
) -> tuple[NDArray[np.int64], int]:
    """Windows [N, T] with others in place of those that repeat, and how many did.

    ``write`` makes so many more. Of a model that has no others to write, repetitions stay.
    """
    count, dropped = len(windows), int(repeating(windows).sum())
    missing = dropped
    while missing and len(windows) < _MOST_AGAIN * count:
        windows = np.concatenate([windows, write(min(BATCH_SIZE, missing))])
        missing = count - int((~repeating(windows)).sum())
    repeats = repeating(windows)
    kept = np.flatnonzero(~repeats)[:count]
    spare = np.flatnonzero(repeats)[: count - len(kept)]
    return windows[np.sort(np.concatenate([kept, spare]))], dropped


def _openings(tokenizer: Any) -> list[list[int]]:
    """Tokens of each opening, behind BOS where the model has one."""
    encoded = [tokenizer(words, add_special_tokens=False)["input_ids"] for words in OPENINGS]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [[*first, *ids] for ids in encoded if ids] or [first or [0]]


@torch.inference_mode()
def _sample(
    model: Any,
    openings: Sequence[Sequence[int]],
    count: int,
    length: int,
    eos_token_id: int | None,
    generator: torch.Generator,
    advance: Advance = lambda steps: None,
) -> torch.Tensor:
    """Sample int64 tokens [count, length]; after an early EOS another text begins."""
    shuffled = torch.randperm(len(openings), generator=generator).tolist()
    kinds = itertools.cycle(openings[number] for number in shuffled)
    given = [deque(next(kinds)) for _ in range(count)]
    tokens = [torch.tensor([queue.popleft() for queue in given])]
    advance(1)
    cache = None
    while len(tokens) < length:
        output = model(input_ids=tokens[-1][:, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        following = _from_nucleus(output.logits[:, -1].float(), generator)
        for row, queue in enumerate(given):
            if tokens[-1][row] == eos_token_id and not queue:
                queue.extend(next(kinds))
            if queue:
                following[row] = queue.popleft()
        tokens.append(following)
        advance(1)
    return torch.stack(tokens, dim=1)


def _from_nucleus(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token, int64 [N], for each row of logits [N, V]."""
    likeliest = logits.softmax(dim=-1).topk(min(_CANDIDATES, logits.shape[-1]))
    before = likeliest.values.cumsum(dim=-1) - likeliest.values
    weights = likeliest.values.masked_fill(before >= _NUCLEUS, 0.0)
    return likeliest.indices.gather(1, torch.multinomial(weights, 1, generator=generator))[:, 0]
