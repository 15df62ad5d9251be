"""Draw calibration windows, and set evaluation windows aside."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nirvana_deploy.base.progress import Progress
from nirvana_deploy.calibrate.texts import read_text_file
from nirvana_deploy.calibrate.windows import (
    CalibrationData,
    TokenWindows,
    calibration_data,
    windows_of_text,
)
from nirvana_deploy.calibrate.windows_file import write_windows
from nirvana_deploy.model.checkpoint import Checkpoint, load_tokenizer
from nirvana_deploy.model.sources import ModelFolder
from nirvana_deploy.output.layout import CALIBRATION_FILE
from nirvana_deploy.output.run import Run

HELDOUT_SEQUENCES, HELDOUT_LEN = 16, 256


def calibrate(
    run: Run,
    source: ModelFolder,
    *,
    calib: str,
    num_sequences: int,
    seq_len: int,
    seed: int,
    eval_text: Path | str | None,
) -> None:
    """Draw the calibration windows and set the evaluation windows aside."""

    def work() -> dict[str, Any]:
        tokenizer = load_tokenizer(source.path)
        data = calibration_data(
            calib,
            tokenizer,
            num_sequences=num_sequences,
            seq_len=seq_len,
            seed=seed,
            heldout_sequences=HELDOUT_SEQUENCES if eval_text is None else 0,
            heldout_len=HELDOUT_LEN,
            checkpoint=Checkpoint.open(source.path),
            progress=run.progress,
        )
        if eval_text is not None:
            windows = evaluation_windows(Path(eval_text), tokenizer, run.progress)
            data = CalibrationData(calibration=data.calibration, heldout=windows)
        write_windows(data, run.out / CALIBRATION_FILE)
        return {
            **calibration_record(data.calibration),
            **_evaluation_record(data.heldout, held_out=eval_text is None),
        }

    run.stage("calibrate", [CALIBRATION_FILE], work)


def _evaluation_record(windows: TokenWindows, *, held_out: bool) -> dict[str, Any]:
    return {
        "evaluation_source": windows.source + (" (held out of calibration)" if held_out else ""),
        "evaluation_text_sha256": windows.text_sha256,
    }


def drawn_record(run: Run) -> dict[str, Any]:
    """What is recorded of the calibration text, whichever stage drew it."""
    stages = run.manifest["stages"]
    result: dict[str, Any] = stages.get("select", stages.get("calibrate"))["result"]
    return result


def evaluation_windows(
    path: Path,
    tokenizer: Any,
    progress: Progress,
    *,
    seq_len: int | None = None,
    max_sequences: int | None = None,
) -> TokenWindows:
    """Consecutive windows of a text file; 16 of 256 tokens unless told otherwise."""
    return windows_of_text(
        read_text_file(path),
        tokenizer,
        seq_len=seq_len or HELDOUT_LEN,
        max_sequences=max_sequences or HELDOUT_SEQUENCES,
        progress=progress,
    )


def every_other(windows: TokenWindows, first: int) -> TokenWindows:
    """Every second window of [M, T], from window ``first`` on."""
    return dataclasses.replace(
        windows, tokens=windows.tokens[first::2], positions=windows.positions[first::2]
    )


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
    }
