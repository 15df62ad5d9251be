"""The shape and the logits of a checkpoint, and a plan for it by random scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.model.checkpoint import Checkpoint, load_checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.plan import PrunePlan, make_plan
from nirvana_deploy.prune.streaming.score import score_units


def shape_of(folder: Path) -> ModelShape:
    return Checkpoint.open(folder).shape


def plan_for(folder: Path, *, sparsity: float = 0.4, seed: int = 5, allocation: str = "global") -> PrunePlan:
    """A plan by random scores; a global one makes layers differ in every dimension."""
    scores = score_units(Checkpoint.open(folder), None, saliency="random", seed=seed)
    return make_plan(
        shape_of(folder),
        scores,
        sparsity=sparsity,
        gamma=1.0,
        allocation=allocation,
        round_to=4,
        saliency="random",
        seed=seed,
    )


def logits_of(folder: Path, tokens: NDArray[np.int64]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_checkpoint(folder)(torch.from_numpy(tokens)).logits
    return logits
