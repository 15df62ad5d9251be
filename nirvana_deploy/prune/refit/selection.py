"""Choose what stays inside the refit: by elimination from the optimum on the repaired prefix.

The order of each linear's inputs and their refit come from one Gram matrix, that of the inputs as the model
made so far gives them, toward the dense states; how many stay was decided by the curves (``curves/``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.curves.budget import Counts
from nirvana_deploy.prune.refit.elimination import (
    Optimum,
    eliminate,
    eliminate_groups,
    group_inputs,
    optimum_of,
)
from nirvana_deploy.prune.refit.least_squares import NormalEquations
from nirvana_deploy.prune.refit.readers import Reader
from nirvana_deploy.prune.refit.reconstruct import Reconstruction, refit_readers

BLOCKS = 64
"""Neurons go in steps of one in so many."""


@dataclass(frozen=True)
class Selected:
    """Which units stay, by layer and sorted, and how well the refit went."""

    groups: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]
    reconstruction: Reconstruction


def select_and_refit(
    checkpoint: Checkpoint,
    counts: Sequence[Counts],
    tokens: NDArray[np.int64],
    out: Path,
    *,
    ridge: float | None = None,
    progress: Progress = SILENT,
) -> Selected:
    """Choose the units that stay, ``counts`` of each layer; refit o and down on windows [N, T] to ``out``.

    ``out`` and errors are those of ``reconstruct_layers``.
    """
    shape = checkpoint.shape
    groups = [tuple(range(layer.kv_heads)) for layer in shape.layers]
    neurons = [tuple(range(layer.ffn_width)) for layer in shape.layers]

    def choose(reader: Reader, equations: NormalEquations) -> torch.Tensor:
        inputs, wanted = equations.weight.shape[1], counts[reader.position]
        if reader.groups is None:  # nobody else holds the optimum, which takes gigabytes
            block = max(1, inputs // BLOCKS)
            kept = eliminate(_optimum(reader, equations), keep=wanted.neurons, block=block).kept
            neurons[reader.position] = tuple(kept.tolist())
            return kept
        most = reader.groups - wanted.groups
        by_removed, _ = eliminate_groups(_optimum(reader, equations), reader.groups, most=most)
        groups[reader.position] = by_removed[-1]
        return group_inputs(by_removed[-1], reader.groups, inputs)

    done = refit_readers(checkpoint, tokens, out, chosen=choose, ridge=ridge, progress=progress)
    return Selected(groups=tuple(groups), neurons=tuple(neurons), reconstruction=done)


def _optimum(reader: Reader, equations: NormalEquations) -> Optimum:
    optimum = optimum_of(equations.gram.cpu(), equations.weight.cpu(), missing=equations.cross.cpu())
    if optimum is None:
        raise NirvanaError(
            f"{reader.name}: its inputs are NaN or infinite on the calibration text; none can be chosen."
        )
    return optimum
