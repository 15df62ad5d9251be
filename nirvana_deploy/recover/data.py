"""Windows to train on, and a few set aside that tell when to stop.

They come from the segments of a text that calibration draws from, never from those held out for quality, so
what is reported had no say. The windows that watch are of the same kinds of text as the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import Progress
from nirvana_deploy.calibrate.mixture import Part, parts_of
from nirvana_deploy.calibrate.windows import TokenWindows, calibration_data, room_for
from nirvana_deploy.model.checkpoint import Checkpoint

MOST_WINDOWS = 4096
"""Distinct windows at most; a longer training reads them again."""
_WATCHING = 24
"""One window of so many watches: a dozen measurements then take a seventh of the time of training."""
_LEAST_WATCHING, _MOST_WATCHING = 2, 32


@dataclass(frozen=True)
class TrainingText:
    """What recovery reads."""

    train: TokenWindows
    """[N, T]."""
    watch: NDArray[np.int64]
    """[M, T]."""


@contextmanager
def as_recover_text() -> Iterator[None]:
    """Calibration's errors, with the option that the text came by."""
    try:
        yield
    except NirvanaError as error:
        message, hint = (
            said and said.replace("--calib", "--recover-text") for said in (error.message, error.hint)
        )
        raise NirvanaError(str(message), hint=hint) from error


@as_recover_text()
def training_text(
    source: str,
    dense: Checkpoint,
    *,
    wanted: int,
    least: int,
    seq_len: int,
    segment_tokens: int,
    seed: int,
    progress: Progress,
) -> TrainingText:
    """Draw up to ``wanted`` windows of ``seq_len`` tokens, fewer where the text has no more.

    ``segment_tokens`` is the longer of a calibration and a held-out window, which decides what is held out.
    Raises NirvanaError for a text with fewer than ``least`` windows beside those that watch.
    """
    parts = parts_of(source, writes_text=dense.shape.family.writes_text)
    tokenizer = dense.tokenizer
    most = min(MOST_WINDOWS, wanted + watching_of(wanted))

    def room_of(part: Part) -> int:
        """Windows of the whole mixture for which this part has text."""
        enough = math.ceil(part.share * most)
        found = room_for(
            part.source,
            tokenizer,
            seq_len=seq_len,
            heldout_len=segment_tokens,
            enough=enough,
            progress=progress,
        )
        return most if found >= enough else int(found / part.share)

    fits = min([most, *(room_of(part) for part in parts if part.source != "self")])
    if fits < least + _LEAST_WATCHING:
        raise NirvanaError(
            f"--recover-text {source}: there is text for {fits} windows of {seq_len} tokens, and a step and "
            f"the windows that watch it need {least + _LEAST_WATCHING}.",
            hint="Give a longer text, mix others in (--recover-text mine.txt:0.5,pydoc), or pass "
            "--recover-batch 1.",
        )
    drawn = calibration_data(
        source,
        tokenizer,
        num_sequences=max(fits, len(parts)),
        seq_len=seq_len,
        seed=seed,
        heldout_sequences=0,
        heldout_len=segment_tokens,
        checkpoint=dense,
        progress=progress,
    ).calibration
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(drawn.tokens))
    watching = watching_of(len(order))
    watch, train = sorted(order[:watching]), sorted(order[watching:])
    return TrainingText(train=drawn.taken(train), watch=drawn.tokens[watch])


def watching_of(windows: int) -> int:
    """How many watch, of so many."""
    return int(np.clip(windows // _WATCHING, _LEAST_WATCHING, _MOST_WATCHING))
