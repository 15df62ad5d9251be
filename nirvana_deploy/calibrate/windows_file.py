"""Calibration windows and unit scores on disk, as safetensors: what a resumed run starts from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.calibrate.windows import CalibrationData


def write_windows(data: CalibrationData, path: Path) -> None:
    """Write calibration [N, T] and held-out [M, T'] token ids, int64, with their origin."""
    tensors = {"calibration": data.calibration.tokens, "heldout": data.heldout.tokens}
    origin = {
        name: {
            "source": part.source,
            "text_sha256": part.text_sha256,
            "seed": part.seed,
            "positions": part.positions,
        }
        for name, part in (("calibration", data.calibration), ("heldout", data.heldout))
    }
    contiguous = {name: np.ascontiguousarray(tokens) for name, tokens in tensors.items()}
    write_bytes(path, save(contiguous, metadata={"origin": json.dumps(origin)}))


def read_windows(path: Path) -> dict[str, NDArray[np.int64]]:
    """Read ``calibration`` [N, T] and ``heldout`` [M, T'], int64."""
    windows: dict[str, NDArray[np.int64]] = load_file(path)
    return windows
