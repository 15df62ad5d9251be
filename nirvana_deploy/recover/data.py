"""Windows to train on, and a few set aside that tell when to stop.

They come from the segments of a text that calibration draws from, never from those held out for quality, so
what is reported had no say. Some windows that watch are of the kinds of text that are trained on, and some
of another kind, if the package has one: they tell when training forgets what it does not read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.calibrate.mixture import Part, parts_of
from nirvana_deploy.calibrate.texts import is_at_hand, require_source
from nirvana_deploy.calibrate.windows import TokenWindows, calibration_data, room_for
from nirvana_deploy.model.checkpoint import Checkpoint

MOST_WINDOWS = 4096
"""Distinct windows at most; a longer training reads them again."""
_WATCHING = 24
"""One window of so many watches: a dozen measurements then take a seventh of the time of training."""
_LEAST_WATCHING, _MOST_WATCHING = 2, 32
OTHER_KINDS = ("prose",)
"""Kinds at hand, of which the first that is not trained on watches too. Those that quality is measured on
because nothing read them (``measure/evaluation_text.py``) are none of them: what watches has a say."""


@dataclass(frozen=True)
class TrainingText:
    """What recovery reads."""

    train: TokenWindows
    """[N, T]."""
    watch: NDArray[np.int64]
    """[M, T], of the kinds trained on."""
    other: TokenWindows | None = None
    """[M', T], of a kind that is not trained on."""

    @property
    def watching(self) -> tuple[NDArray[np.int64], ...]:
        """The windows that watch, kind by kind."""
        return (self.watch,) if self.other is None else (self.watch, self.other.tokens)

    @property
    def windows(self) -> NDArray[np.int64]:
        """All of them, as they are numbered: those to train on first."""
        return np.concatenate([self.train.tokens, *self.watching])


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
    most = min(MOST_WINDOWS, wanted + watching_of(wanted))
    shape = seq_len, segment_tokens
    read = [part for part in parts if part.source != "self"]
    fits = [_fitting(part, dense, shape, most=most, least=least, progress=progress) for part in read]
    drawn = calibration_data(
        source,
        dense.tokenizer,
        num_sequences=max(min([most, *fits]), len(parts)),
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
    other = _another_kind({part.source for part in parts}, dense, shape, watching // 2, seed, progress)
    return TrainingText(train=drawn.taken(train), watch=drawn.tokens[watch], other=other)


def _another_kind(
    trained_on: Collection[str],
    dense: Checkpoint,
    shape: tuple[int, int],
    count: int,
    seed: int,
    progress: Progress,
) -> TokenWindows | None:
    """Windows of the first other kind with enough text, if any."""
    seq_len, heldout_len = shape
    how: dict[str, Any] = {"seq_len": seq_len, "heldout_len": heldout_len, "progress": progress}
    count = max(_LEAST_WATCHING, count)
    for kind in OTHER_KINDS:
        if kind in trained_on:
            continue
        text = room_for(kind, dense.tokenizer, enough=count, **how)
        if len(text.calibration_starts) >= count:
            how |= {"num_sequences": count, "seed": seed, "heldout_sequences": 0, "checkpoint": dense}
            return calibration_data(kind, dense.tokenizer, **how).calibration
    return None


def _fitting(
    part: Part, dense: Checkpoint, shape: tuple[int, int], *, most: int, least: int, progress: Progress
) -> int:
    """Windows of a mixture, at most ``most``, for which its part has text.

    ``shape`` is (tokens of a window, tokens of the longer of a calibration and a held-out window). Raises
    NirvanaError for fewer than ``least`` beside those that watch.
    """
    enough, needed = (math.ceil(part.share * windows) for windows in (most, least + _LEAST_WATCHING))
    seq_len, heldout_len = shape
    text = room_for(
        part.source,
        dense.tokenizer,
        seq_len=seq_len,
        heldout_len=heldout_len,
        enough=enough,
        progress=progress,
    )
    found = len(text.calibration_starts)
    if found < needed:
        raise NirvanaError(
            f"--recover-text {part.source} has {text.length:,} tokens with this model's tokenizer, room for "
            f"{found} windows of {seq_len}; a step and the windows that watch it need {needed}, which is "
            f"{text.needed_tokens(needed):,} tokens.",
            hint="Give a longer text, mix others in (--recover-text mine.txt:0.5,pydoc), or pass "
            "--recover-batch 1.",
        )
    return most if found >= enough else int(found / part.share)


def require_text(parts: Iterable[Part], dense: Checkpoint, shape: tuple[int, int], *, least: int) -> None:
    """Raise as :func:`training_text` does where a text at hand, which takes no network, is too short."""
    for part in parts:
        require_source(part.source, dense.tokenizer)
        if is_at_hand(part.source):
            _fitting(part, dense, shape, most=least + _LEAST_WATCHING, least=least, progress=SILENT)


def watching_of(windows: int) -> int:
    """How many watch, of so many."""
    return int(np.clip(windows // _WATCHING, _LEAST_WATCHING, _MOST_WATCHING))
