"""Scores of units in safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_tensors
from nirvana_deploy.prune.saliency.units import UnitScores


def write_scores(scores: UnitScores, path: Path) -> None:
    """Write unit scores, float64, one tensor per layer and kind."""
    tensors = {f"groups.{layer}": values for layer, values in enumerate(scores.groups)}
    tensors |= {f"neurons.{layer}": values for layer, values in enumerate(scores.neurons)}
    write_bytes(path, save({name: np.ascontiguousarray(values) for name, values in tensors.items()}))


def read_scores(path: Path) -> UnitScores:
    """Unit scores as they were written; raises NirvanaError for a file that holds something else."""
    tensors, _ = read_tensors(path, hint=_AGAIN)
    layers = range(len(tensors) // 2)
    if set(tensors) != {f"{kind}.{layer}" for kind in ("groups", "neurons") for layer in layers} or any(
        scores.dtype != np.float64 or scores.ndim != 1 for scores in tensors.values()
    ):
        raise NirvanaError(f"{path} holds no scores: groups.N and neurons.N, float64 [units].", hint=_AGAIN)
    return UnitScores(
        groups=tuple(tensors[f"groups.{layer}"] for layer in layers),
        neurons=tuple(tensors[f"neurons.{layer}"] for layer in layers),
    )


_AGAIN = "Score again: repeat the command with --force, or with another --out."
