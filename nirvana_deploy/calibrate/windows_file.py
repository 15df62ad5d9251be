"""Calibration windows and unit scores on disk, as safetensors: what a resumed run starts from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_tensors
from nirvana_deploy.calibrate.windows import CalibrationData


def write_windows(data: CalibrationData, path: Path) -> None:
    """Write calibration [N, T] and held-out [M, T'] token ids, int64, with their origin.

    Of a mixture, ``calibration_part`` [N] and ``heldout_part`` [M], int64, say which part a window is of.
    """
    both = {"calibration": data.calibration, "heldout": data.heldout}
    tensors = {name: windows.tokens for name, windows in both.items()} | {
        f"{name}_part": np.array(windows.part_of_window, np.int64)
        for name, windows in both.items()
        if windows.parts
    }
    origin = {
        name: {
            "source": windows.source,
            "text_sha256": windows.text_sha256,
            "seed": windows.seed,
            "positions": windows.positions,
            **({"parts": [asdict(part) for part in windows.parts]} if windows.parts else {}),
        }
        for name, windows in both.items()
    }
    contiguous = {name: np.ascontiguousarray(tokens) for name, tokens in tensors.items()}
    write_bytes(path, save(contiguous, metadata={"origin": json.dumps(origin)}))


def read_windows(path: Path) -> dict[str, NDArray[np.int64]]:
    """Read ``calibration`` [N, T] and ``heldout`` [M, T'], int64; of a mixture the parts too.

    Raises NirvanaError for a file that holds something else.
    """
    tensors, _ = read_tensors(path, hint=_AGAIN)
    for name in ("calibration", "heldout"):
        found = tensors.get(name)
        if found is None or found.dtype != np.int64 or found.ndim != 2 or (found < 0).any():
            raise NirvanaError(f"{path} holds no {name!r}: token ids, int64 [windows, tokens].", hint=_AGAIN)
        parts = tensors.get(f"{name}_part")
        if parts is not None and (parts.dtype != np.int64 or parts.shape != (len(found),)):
            raise NirvanaError(f"{path}: {name}_part is no int64 [windows].", hint=_AGAIN)
    return tensors


_AGAIN = "Draw the windows again: repeat the command that made the folder with --force."
