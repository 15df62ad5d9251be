"""The scale of the curves: KL to the dense model with one layer cut and refitted, all others dense.

A curve's shape is right and its height is not (benchmarks/NOTES.md), so measured KL scales it. What a cut
changes in a reader's outputs is known from the layer alone: all cuts of all layers run through it in one
pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.curves.curve import Curve
from nirvana_deploy.prune.refit.readers import changed, readers_of
from nirvana_deploy.prune.streaming.model import StreamedModel

_LEAST_RATIO, _MOST_RATIO = 0.2, 20.0
_NEIGHBOURS = 2
_BORROWED = 1 / 3
"""Share of a layer's ratio, as a logarithm, that comes from its neighbours."""
_BLOCK_POSITIONS = 128


@dataclass
class Trial:
    """One reader of one layer with some of its units gone."""

    position: int
    """In ``shape.layers``."""
    attention: bool
    removed: int
    """Units."""
    change: torch.Tensor
    """Of the reader's outputs on the measured windows, [N, T, D]."""
    kl: float = field(default=0.0)
    """Measured, nats per position."""


def measure(
    model: StreamedModel, trials: Sequence[Trial], windows: torch.Tensor, *, progress: Progress = SILENT
) -> None:
    """Set the ``kl`` of each trial on windows [N, T]."""
    done: list[Trial] = []

    def changes(positions: Sequence[int], block: nn.Module) -> list[AbstractContextManager[None]]:
        contexts: list[AbstractContextManager[None]] = []
        for reader in readers_of(model.shape, positions, block):
            for trial in trials:
                if (trial.position, trial.attention) == (reader.position, reader.groups is not None):
                    done.append(trial)
                    contexts.append(changed(reader.linear, trial.change.add))
        return contexts

    dense, *branches = model.branches(windows, changes, progress=progress)
    head = model.output_head()
    positions = dense.shape[0] * dense.shape[1]
    with torch.no_grad(), progress.task("Comparing the cuts", positions) as advance:
        for start in range(0, positions, _BLOCK_POSITIONS):
            block = slice(start, start + _BLOCK_POSITIONS)
            log_p = head(dense.flatten(0, 1)[block]).log_softmax(dim=-1)
            p = log_p.exp()
            for trial, states in zip(done, branches, strict=True):
                log_q = head(states.flatten(0, 1)[block]).log_softmax(dim=-1)
                trial.kl += float((p * (log_p - log_q)).sum(dtype=torch.float64)) / positions
            advance(len(log_p))


def scaled_by(
    shape: ModelShape, curves: Sequence[Curve], trials: Sequence[Trial], *, attention: bool
) -> list[Curve]:
    """The curves of one kind, multiplied by the ratios of measured to predicted.

    A layer's ratio is the geometric mean over its trials, a third of it that of up to two neighbours on each
    side: of so few tokens it is uncertain by a fifth or more, and a plan takes what looks too cheap first.
    """
    own: dict[int, float] = {}
    for position, curve in enumerate(curves):
        ratios = [
            trial.kl / curve.at(trial.removed)
            for trial in trials
            if (trial.position, trial.attention) == (position, attention) and curve.at(trial.removed) > 0
        ]
        if ratios:
            own[position] = float(np.log(np.clip(ratios, _LEAST_RATIO, _MOST_RATIO)).mean())
    scaled = []
    for position, curve in enumerate(curves):
        if position not in own:
            scaled.append(curve)
            continue
        site = shape.layers[position].site
        near = [
            own[other]
            for other in range(position - _NEIGHBOURS, position + _NEIGHBOURS + 1)
            if other in own and other != position and shape.layers[other].site == site
        ]
        borrowed = float(np.mean(near)) if near else own[position]
        log_ratio = (1 - _BORROWED) * own[position] + _BORROWED * borrowed
        scaled.append(curve.scaled(math.exp(log_ratio)))
    return scaled
