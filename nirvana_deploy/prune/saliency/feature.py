"""Forward-only saliencies, from the inputs of o and down: pure maths on tensors.

With X_c the input c of one of the two linears over all N x T calibration positions and W_c its column:
``wanda-sp`` sums ``||W_c||_1 ||X_c||_2`` over a unit's columns; ``flap`` averages ``var(X_c) ||W_c||_2^2``
over them, standardised within layer and kind, for o squared first. FLAP: An et al., arXiv 2312.11983, and the
authors' code (CASIA-IVA-Lab/FLAP); where this departs from it and why both want ``--allocation uniform``:
benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FeatureStatistics:
    """Sums over all positions of the inputs of one linear with C inputs."""

    positions: int
    """N x T."""
    total: torch.Tensor
    """Sum of each input; float64 [C]."""
    squares: torch.Tensor
    """Sum of each input's square; float64 [C]."""

    @property
    def norm(self) -> torch.Tensor:
        """``||X_c||_2`` over positions; float64 [C]."""
        return self.squares.sqrt()

    @property
    def variance(self) -> torch.Tensor:
        """Unbiased sample variance over positions; float64 [C]. Zero where there is one position."""
        centred = self.squares - self.total.square() / self.positions
        return centred.clamp(min=0) / max(self.positions - 1, 1)


def statistics_of(features: torch.Tensor) -> FeatureStatistics:
    """The statistics of inputs [..., C]."""
    flat = features.detach().reshape(-1, features.shape[-1]).double()
    return FeatureStatistics(positions=len(flat), total=flat.sum(0), squares=flat.square().sum(0))


def merged(first: FeatureStatistics, second: FeatureStatistics) -> FeatureStatistics:
    """The statistics of both sets of positions together."""
    return FeatureStatistics(
        positions=first.positions + second.positions,
        total=first.total + second.total,
        squares=first.squares + second.squares,
    )


FeatureScore = Callable[[torch.Tensor, FeatureStatistics, int, bool], torch.Tensor]
"""(weight float32 [D, C], statistics of its C inputs, units, whether it is attention's) -> float64 [units].

A unit owns C / units consecutive columns.
"""


def wanda_sp(
    weight: torch.Tensor, statistics: FeatureStatistics, units: int, attention: bool
) -> torch.Tensor:
    """Sum over a unit's columns of ``||W_c||_1 ||X_c||_2``."""
    columns = weight.abs().sum(0, dtype=torch.float64) * statistics.norm
    return columns.reshape(units, -1).sum(1)


def flap(weight: torch.Tensor, statistics: FeatureStatistics, units: int, attention: bool) -> torch.Tensor:
    """Mean over a unit's columns of the standardised ``var(X_c) ||W_c||_2^2`` (squared for attention)."""
    columns = statistics.variance * weight.double().square().sum(0)
    if attention:
        columns = columns.square()
    spread = columns.std() if len(columns) > 1 else columns.new_zeros(())
    standardised = torch.zeros_like(columns) if spread == 0 else (columns - columns.mean()) / spread
    return standardised.reshape(units, -1).mean(1)
