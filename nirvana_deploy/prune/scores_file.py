"""Scores of units in safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.prune.saliency.units import UnitScores


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
