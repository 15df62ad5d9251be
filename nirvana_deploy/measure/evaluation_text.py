"""The text that quality is measured on, by kind: a cut is good at what it has read, so one kind is unread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nirvana_deploy.calib_sets as calib_sets
from nirvana_deploy.calibrate.mixture import parts_of
from nirvana_deploy.calibrate.stage import HELD_OUT
from nirvana_deploy.calibrate.texts import SourceText, name_of_text
from nirvana_deploy.calibrate.windows import TokenWindows, windows_of_text
from nirvana_deploy.calibrate.windows_file import read_windows

UNSEEN = "unseen"
"""The kind of the text in the package that no source has."""
_LONGEST_WINDOW = 2048
"""Tokens; the text is several such windows with any tokenizer."""


@dataclass(frozen=True)
class EvaluationText:
    """Windows [M, T] and where they come from."""

    tokens: NDArray[np.int64]
    source: str
    kinds: tuple[str, ...]
    """The kind of each window: the source, or the part of a mixture."""

    def has_a_kind_beside(self, known: frozenset[str]) -> bool:
        """Whether a kind is not among ``known``; held-out text had its say where candidates were compared."""
        return not self.source.endswith(HELD_OUT) and not known.issuperset(self.kinds)


def text_of(windows: TokenWindows) -> EvaluationText:
    """Windows of one text, or of several."""
    kinds = [windows.source] * len(windows.tokens)
    if windows.parts:
        kinds = [windows.parts[part].source for part in windows.part_of_window]
    return EvaluationText(windows.tokens, windows.source, tuple(kinds))


def held_out_text(path: Path, record: Mapping[str, Any]) -> EvaluationText:
    """The windows that calibration set aside in the file ``path``; ``record`` is what its stage recorded."""
    found = read_windows(path)
    tokens, source = found["heldout"], record["evaluation_source"]
    parts = [part["source"] for part in record.get("heldout_parts") or ()]
    kinds = [source.removesuffix(HELD_OUT)] * len(tokens)
    if parts:
        kinds = [parts[part] for part in found["heldout_part"]]
    return EvaluationText(tokens, source, tuple(kinds))


def calibration_kinds(record: Mapping[str, Any]) -> frozenset[str]:
    """The sources that a run was calibrated on."""
    return frozenset(part["source"] for part in record.get("parts") or (record,))


def trained_kinds(recover_text: str, *, writes_text: bool) -> frozenset[str]:
    """The sources that recovery trained on."""
    return frozenset(name_of_text(part.source) for part in parts_of(recover_text, writes_text=writes_text))


def unseen_text(text: EvaluationText, tokenizer: Any) -> EvaluationText:
    """Windows from all over the text that no source has: as many as ``text`` has of one kind."""
    windows = windows_of_text(
        SourceText(UNSEEN, calib_sets.unseen()),
        tokenizer,
        seq_len=min(text.tokens.shape[1], _LONGEST_WINDOW),
    )
    wanted = min(max(Counter(text.kinds).values()), len(windows.tokens))
    spread = np.linspace(0, len(windows.tokens) - 1, wanted).round().astype(int)
    return text_of(windows.taken(spread.tolist()))
