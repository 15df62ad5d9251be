"""Where the windows of a token stream begin: of every five segments, four calibrate and one is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError

_CALIBRATION_SEGMENTS = 4
"""Segments per block; one more is held out."""
_RUN_TOKENS = 16
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MOST_SHARED = 0.5
"""A held-out window of which more than this share of runs is calibration text too is a copy of it;
boilerplate and common phrases stay far below."""


@dataclass(frozen=True)
class Segments:
    """Layout of a stream: which windows fit, and how many tokens a request needs."""

    length: int
    seq_len: int
    heldout_len: int

    @property
    def _segment(self) -> int:
        return max(self.seq_len, self.heldout_len)

    @property
    def _block(self) -> int:
        return (_CALIBRATION_SEGMENTS + 1) * self._segment

    @property
    def calibration_starts(self) -> list[int]:
        """Starts of the windows that a seed can draw."""
        return self._starts(0, _CALIBRATION_SEGMENTS * self._segment, self.seq_len)

    @property
    def heldout_starts(self) -> list[int]:
        """Starts of the windows that no seed can draw."""
        return self._starts(_CALIBRATION_SEGMENTS * self._segment, self._block, self.heldout_len)

    def spread_heldout(self, stream: NDArray[np.int64], count: int, *, source: str) -> list[int]:
        """Starts of ``count`` held-out windows, spread over the stream, none a copy of calibration text.

        Raises NirvanaError, naming ``source``, where the text repeats itself too often for that.
        """
        starts = self.heldout_starts
        if not count:
            return []
        copied = self._copied(stream, starts)
        fresh = [start for start, copy in zip(starts, copied, strict=True) if not copy]
        if len(fresh) < count:
            raise NirvanaError(
                f"{source} repeats itself: {int(copied.sum())} of its {len(starts)} held-out windows also "
                f"stand in its calibration text, which leaves {len(fresh)} of the {count} asked for.",
                hint="Remove the repetitions, or measure quality on another text: --eval-text FILE",
            )
        chosen = [starts[i] for i in np.arange(count) * len(starts) // count]
        spare = iter(sorted(set(fresh).difference(chosen)))
        kept = set(fresh)
        return sorted(start if start in kept else next(spare) for start in chosen)

    def _copied(self, stream: NDArray[np.int64], starts: Sequence[int]) -> NDArray[np.bool_]:
        """Whether each held-out window consists mostly of runs of tokens that calibration could draw, too."""
        if min(self.seq_len, self.heldout_len) < _RUN_TOKENS:  # runs so short stand anywhere
            return np.zeros(len(starts), dtype=bool)
        runs = _hashed_runs(stream)
        drawable = np.zeros(len(runs), dtype=bool)
        for start in self.calibration_starts:
            drawable[start : start + self.seq_len - _RUN_TOKENS + 1] = True
        known = np.isin(runs, runs[drawable])
        each = self.heldout_len - _RUN_TOKENS + 1
        return np.array([known[start : start + each].mean() > _MOST_SHARED for start in starts], dtype=bool)

    def _starts(self, begin: int, end: int, window: int) -> list[int]:
        """Starts of adjacent windows that fit into [begin, end) of each block."""
        return [
            start
            for block in range(0, self.length, self._block)
            for start in range(block + begin, min(block + end, self.length) - window + 1, window)
        ]

    def needed_tokens(self, num_sequences: int) -> int:
        """Fewest tokens of a text in which so many windows fit that a seed can draw."""
        return self._needed(num_sequences, 0, _CALIBRATION_SEGMENTS * self._segment, self.seq_len)

    def require(self, num_sequences: int, heldout_sequences: int, *, source: str, share: float = 1.0) -> None:
        """Raise NirvanaError unless the requested windows fit; they are this ``share`` of a mixture's."""
        fits, heldout_fits = len(self.calibration_starts), len(self.heldout_starts)
        if fits >= num_sequences and heldout_fits >= heldout_sequences:
            return
        calibration_end = _CALIBRATION_SEGMENTS * self._segment
        needed = max(
            self.needed_tokens(num_sequences),
            self._needed(heldout_sequences, calibration_end, self._block, self.heldout_len),
        )
        fitting = f"--num-sequences {int(fits / share)}" if 0 < fits < num_sequences else "a longer text"
        mixed, smaller = (
            (f" for a share of {share:.3g}", f", or {source} a smaller share") if share < 1 else ("", "")
        )
        raise NirvanaError(
            f"{source} is too short{mixed}: it has {self.length:,} tokens with this model's tokenizer. "
            f"{num_sequences} x {self.seq_len} tokens of calibration and {heldout_sequences} x "
            f"{self.heldout_len} held out (one token in {_CALIBRATION_SEGMENTS + 1} is reserved for these) "
            f"need {needed:,}.",
            hint=f"What fits: {fits} calibration and {heldout_fits} held-out windows. "
            f"Give {fitting}{smaller}.",
        )

    def _needed(self, count: int, begin: int, end: int, window: int) -> int:
        """Fewest tokens in which ``count`` windows fit."""
        if not count:
            return 0
        full_blocks, last = divmod(count - 1, (end - begin) // window)
        return full_blocks * self._block + begin + (last + 1) * window


def _hashed_runs(stream: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number for every run of 16 consecutive tokens: equal runs, equal numbers."""
    tokens = stream.astype(np.uint64) + np.uint64(1)
    runs = np.zeros(max(0, len(tokens) - _RUN_TOKENS + 1), dtype=np.uint64)
    for offset in range(_RUN_TOKENS):
        runs = runs * _MULTIPLIER + tokens[offset : offset + len(runs)]  # modulo 2 to the 64
    return runs
