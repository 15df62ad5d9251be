"""Draw calibration windows, and set evaluation windows aside."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.recipe import names_of
from nirvana_deploy.calibrate.mixture import Part
from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.calibrate.texts import SourceText, read_text_file
from nirvana_deploy.calibrate.windows import (
    CalibrationData,
    TokenWindows,
    calibration_data,
    mixed,
    windows_of_text,
)
from nirvana_deploy.calibrate.windows_file import write_windows
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import CALIBRATION_FILE
from nirvana_deploy.output.record_kinds import SelectionRecord
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage

_TOKENS_AN_INPUT = 20
"""A refit of k inputs on n tokens errs by about k/n more than the best one."""
_WINDOWS = (32, 256)
"""The least and the most that are drawn unasked."""
WINDOW_TOKENS, _MOST_WINDOWS = Calibration.heldout_len, Calibration.heldout_sequences
"""Of a text to measure on, unless told otherwise."""
HELD_OUT = " (held out of calibration)"
"""What follows the source of evaluation text that calibration set aside."""


def calibrate(run: Run, dense: Checkpoint, recipe: Calibration) -> Stage:
    """Draw the calibration windows of one source and set evaluation windows aside."""

    def work() -> dict[str, Any]:
        data = calibration_data(
            recipe.calib,
            dense.tokenizer,
            num_sequences=windows_wanted(recipe, dense.shape),
            seq_len=recipe.seq_len,
            seed=recipe.seed,
            heldout_sequences=0 if recipe.eval_text else recipe.heldout_sequences,
            heldout_len=recipe.heldout_len,
            checkpoint=dense,
            progress=run.progress,
        )
        heldout = evaluation_windows(recipe, dense.tokenizer, run.progress) or data.heldout
        write_windows(CalibrationData(data.calibration, heldout), run.out / CALIBRATION_FILE)
        return {**calibration_record(data.calibration), **evaluation_record(recipe, heldout)}

    return Stage(stage.CALIBRATE, needs=(), makes=(CALIBRATION_FILE,), work=work, reads=names_of(Calibration))


def windows_wanted(recipe: Calibration, shape: ModelShape) -> int:
    """How many calibration windows to draw: as many as the recipe says, or enough for the widest FFN."""
    if recipe.num_sequences is not None:
        return recipe.num_sequences
    widest = max(layer.ffn_width for layer in shape.layers)
    return int(np.clip(math.ceil(_TOKENS_AN_INPUT * widest / recipe.seq_len), *_WINDOWS))


def why_few_tokens(recipe: Calibration, shape: ModelShape) -> str | None:
    """What to say where a wide model would want more windows than are drawn unasked; else None."""
    windows = windows_wanted(recipe, shape)
    widest = max(layer.ffn_width for layer in shape.layers)
    tokens = windows * recipe.seq_len
    if recipe.num_sequences is not None or tokens >= _TOKENS_AN_INPUT * widest:
        return None
    wanted = math.ceil(_TOKENS_AN_INPUT * widest / recipe.seq_len)
    return (
        f"At most {_WINDOWS[1]} windows are drawn unasked: {tokens:,} tokens, {tokens / widest:.1f} for each "
        f"of {widest:,} neurons, where {_TOKENS_AN_INPUT} are better: --num-sequences {wanted}."
    )


def evaluation_windows(recipe: Calibration, tokenizer: Any, progress: Progress) -> TokenWindows | None:
    """Windows of the texts that the recipe names for quality; None when it names none."""
    if not recipe.eval_text:
        return None
    return text_windows(
        recipe.eval_text,
        tokenizer,
        progress,
        seq_len=recipe.heldout_len,
        max_sequences=recipe.heldout_sequences,
    )


def text_windows(
    paths: Sequence[Path],
    tokenizer: Any,
    progress: Progress,
    *,
    seq_len: int | None = None,
    max_sequences: int | None = None,
) -> TokenWindows:
    """Consecutive windows [M, T] of text files, a part each: 16 of 256 tokens unless told otherwise.

    Raises what :func:`evaluation_texts` raises, and NirvanaError for a text shorter than one window.
    """
    windows = [
        windows_of_text(
            text,
            tokenizer,
            seq_len=seq_len or WINDOW_TOKENS,
            max_sequences=max_sequences or _MOST_WINDOWS,
            progress=progress,
        )
        for text in evaluation_texts(paths, tokenizer, progress)
    ]
    if len(windows) == 1:
        return windows[0]
    total = sum(len(one.tokens) for one in windows)
    return mixed([Part(one.source, len(one.tokens) / total) for one in windows], windows)


def evaluation_texts(
    paths: Sequence[Path], tokenizer: Any, progress: Progress = SILENT
) -> tuple[SourceText, ...]:
    """The text files that ``--eval-text`` names.

    Raises NirvanaError for what holds no text, and for two files of one name, which no table can tell apart.
    """
    texts = tuple(read_text_file(path, tokenizer=tokenizer, progress=progress) for path in paths)
    names = [text.name for text in texts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise NirvanaError(
            f"--eval-text names {twice[0]} twice; reports tell texts apart by the names of their files.",
            hint="Name each text once, or rename one of the files.",
        )
    return texts


def segment_tokens(recipe: Calibration, *, single: bool) -> int:
    """The longer of a calibration and a held-out window, which decides what of a text is held out.

    Not ``single``, there are candidates, which are compared on held-out windows of another length.
    """
    return max(recipe.seq_len, recipe.heldout_len if single else recipe.selection_len)


def every_other(windows: TokenWindows, first: int) -> TokenWindows:
    """Every second window of each part, from window ``first`` on, in the order of ``windows`` [M, T]."""
    parts = windows.part_of_window or (0,) * len(windows.tokens)
    part_by_part = sorted(range(len(parts)), key=parts.__getitem__)
    return windows.taken(sorted(part_by_part[first::2]))


def evaluation_record(recipe: Calibration, windows: TokenWindows) -> dict[str, Any]:
    """What is recorded of the text that quality is measured on."""
    held_out = "" if recipe.eval_text else HELD_OUT
    return {
        "evaluation_source": windows.source + held_out,
        "evaluation_text_sha256": windows.text_sha256,
        **_parts_record("heldout_parts", windows),
    }


class PartRecord(TypedDict):
    """One source of a mixture, among others of its facts."""

    source: str


class Drawn(TypedDict, total=False):
    """What is recorded of the calibration text, among others of its facts."""

    source: Required[str]
    parts: list[PartRecord]
    evaluation_source: Required[str]
    heldout_parts: list[PartRecord]
    saliency: str
    gamma: float | None
    selection: SelectionRecord


def drawn_record(run: Run) -> Drawn:
    """What is recorded of the calibration text, by whichever stage drew it."""
    return run.result(stage.SELECT if run.has(stage.SELECT) else stage.CALIBRATE, Drawn)


def calibration_record(calibration: TokenWindows) -> dict[str, Any]:
    """What a plan says about its calibration windows."""
    num_sequences, seq_len = calibration.tokens.shape
    return {
        "source": calibration.source,
        "num_sequences": num_sequences,
        "seq_len": seq_len,
        "text_sha256": calibration.text_sha256,
        "seed": calibration.seed,
        "draw": calibration.draw,
        **_parts_record("parts", calibration),
    }


def _parts_record(key: str, windows: TokenWindows) -> dict[str, Any]:
    """The parts of a mixture, as the windows' file counts them; nothing for a single source."""
    parts = [
        {**dataclasses.asdict(part), "windows": windows.part_of_window.count(index)}
        for index, part in enumerate(windows.parts)
    ]
    return {key: parts} if parts else {}
