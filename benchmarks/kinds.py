"""Texts of several kinds, and what ONNX models make of them; recover.py judges with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recipes import SHIPPED, WINDOW_TOKENS, text_files  # the script beside this one

from nirvana_deploy.calibrate.texts import read_text_file
from nirvana_deploy.calibrate.windows import calibration_data, windows_of_text
from nirvana_deploy.measure.quality import quality_of
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.runtime.registry import open_runner

WINDOWS = 8
"""Of each kind."""


def texts_of(dense: Checkpoint, given: Sequence[Path]) -> dict[str, NDArray[np.int64]]:
    """Windows [M, T] of each kind of text; no model has been calibrated on them."""
    texts = {
        path.stem: windows_of_text(
            read_text_file(path), dense.tokenizer, seq_len=WINDOW_TOKENS, max_sequences=WINDOWS
        ).tokens
        for path in text_files(given)
    }
    for name in SHIPPED:
        drawn = calibration_data(
            name,
            dense.tokenizer,
            num_sequences=1,
            seq_len=WINDOW_TOKENS,
            seed=0,
            heldout_sequences=WINDOWS,
            heldout_len=WINDOW_TOKENS,
        )
        texts[name] = drawn.heldout.tokens
    return texts


def judged(
    folders: Mapping[str, Path], texts: Mapping[str, NDArray[np.int64]], threads: int
) -> dict[str, dict[str, Any]]:
    """Perplexity and KL of each model by kind of text."""
    kinds = [name for name, windows in texts.items() for _ in windows]
    baseline, *others = folders
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(open_runner(path, threads=threads)) for name, path in folders.items()
        }
        found = quality_of(
            runners[baseline],
            {name: runners[name] for name in others},
            np.concatenate(list(texts.values())),
            baseline_name=baseline,
            kinds=kinds,
        )
    return {name: quality["parts"] for name, quality in found.items()}
