"""Calibration windows and unit scores on disk, as safetensors: what a resumed run starts from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from nirvana_deploy.artifact import write_bytes
from nirvana_deploy.prune.calibrate import CalibrationData
from nirvana_deploy.prune.units import UnitScores


def write_windows(data: CalibrationData, path: Path) -> None:
    """Write calibration [N, T] and held-out [M, T'] token ids, int64, with where they come from."""
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
    """``calibration`` [N, T] and ``heldout`` [M, T'], int64."""
    windows: dict[str, NDArray[np.int64]] = load_file(path)
    return windows


def write_scores(scores: UnitScores, path: Path) -> None:
    """Write unit scores, float64, one tensor per layer and kind."""
    tensors = {f"groups.{layer}": values for layer, values in enumerate(scores.groups)}
    tensors |= {f"neurons.{layer}": values for layer, values in enumerate(scores.neurons)}
    write_bytes(path, save({name: np.ascontiguousarray(values) for name, values in tensors.items()}))


def read_scores(path: Path) -> UnitScores:
    """Unit scores as they were written."""
    tensors = load_file(path)
    layers = len(tensors) // 2
    return UnitScores(
        groups=tuple(tensors[f"groups.{layer}"] for layer in range(layers)),
        neurons=tuple(tensors[f"neurons.{layer}"] for layer in range(layers)),
    )
