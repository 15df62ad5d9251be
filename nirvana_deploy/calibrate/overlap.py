"""Check that held-out and calibration text are disjoint: by position in one text, else by content."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.windows import TokenWindows

_RUN_TOKENS = 16
_MOST_SHARED = 0.5
"""A held-out window of which more than this share of runs also stands in another text's calibration windows
was copied from there; boilerplate and common phrases stay far below."""


def refuse_overlap(calibrations: Sequence[TokenWindows], heldout: Sequence[TokenWindows]) -> None:
    """Raise NirvanaError when a held-out window overlaps a calibration window, naming both sources.

    Mixtures are compared part by part. Within one text (same sha256) positions decide. Between texts, for
    instance a file and a copy of it with another name or ending, it is shared runs of 16 tokens.
    """
    held_out = [part for windows in heldout for part in windows.by_part()]
    calibrated = [part for windows in calibrations for part in windows.by_part()]
    for held in held_out:
        for calibration in calibrated:
            same_text = held.text_sha256 == calibration.text_sha256
            if (_positions_meet if same_text else _contents_meet)(held, calibration):
                raise NirvanaError(
                    f"Held-out text of {held.source!r} is also calibration text of {calibration.source!r}: "
                    "a KL divergence on it would flatter that candidate.",
                    hint="Name each corpus once, and give no corpus that contains another.",
                )


def _positions_meet(one: TokenWindows, other: TokenWindows) -> bool:
    first, second = np.array(one.positions), np.array(other.positions)
    if not (len(first) and len(second)):
        return False
    begins, ends = first[:, None], first[:, None] + one.tokens.shape[1]
    return bool(((second < ends) & (begins < second + other.tokens.shape[1])).any())


def _contents_meet(held: TokenWindows, calibration: TokenWindows) -> bool:
    known = {run.tobytes() for window in calibration.tokens for run in _runs(window)}
    for window in held.tokens:
        runs = _runs(window)
        if sum(run.tobytes() in known for run in runs) > _MOST_SHARED * len(runs):
            return True
    return False


def _runs(window: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return all runs of consecutive tokens; a shorter window is one run."""
    return np.lib.stride_tricks.sliding_window_view(window, min(_RUN_TOKENS, len(window)))
