"""The text that quality is measured on, by kind: a cut is good at what it was calibrated on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.calibrate.mixture import parts_of
from nirvana_deploy.calibrate.stage import HELD_OUT
from nirvana_deploy.calibrate.texts import read_source
from nirvana_deploy.calibrate.windows import TokenWindows, windows_of_text
from nirvana_deploy.calibrate.windows_file import read_windows

_OTHERS = ("pydoc", "code")
"""Text that every machine has."""
_OTHER_TOKENS = 1024


@dataclass(frozen=True)
class EvaluationText:
    """Windows [M, T] and where they come from."""

    tokens: NDArray[np.int64]
    source: str
    kinds: tuple[str, ...]
    """The kind of each window: the source, or the part of a mixture."""


def text_of(windows: TokenWindows) -> EvaluationText:
    """Windows of a single source."""
    return EvaluationText(windows.tokens, windows.source, (windows.source,) * len(windows.tokens))


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
    return frozenset(part.source for part in parts_of(recover_text, writes_text=writes_text))


def other_text(
    known: frozenset[str], tokenizer: Any, shape: tuple[int, ...], progress: Progress = SILENT
) -> EvaluationText | None:
    """Windows of a kind that is not among ``known``: at most M of T tokens for ``shape`` (M, T), 1024 in all.

    None where there is no such kind, or, with a note, where this Python lacks its text.
    """
    num_windows, window_tokens = shape
    name = next((other for other in _OTHERS if other not in known), None)
    if name is None:
        return None
    try:
        text = read_source(name)
        windows = windows_of_text(
            text,
            tokenizer,
            seq_len=window_tokens,
            max_sequences=min(num_windows, max(1, _OTHER_TOKENS // window_tokens)),
            progress=progress,
        )
    except NirvanaError as error:
        progress.note(f"Quality is measured on one kind of text only: {error.message}")
        return None
    return text_of(windows)
