"""Forward-only saliencies: what the inputs of the output projections say about the units that make them.

Both come from FLAP (An et al., Fluctuation-based Adaptive Structured Pruning, arXiv 2312.11983; its
authors' code, CASIA-IVA-Lab/FLAP) and look at two linears of a layer only, o and down: the inputs of o are
what the heads of a KV group compute, those of down what an FFN neuron computes. With X_c the input c of
one of them over all N x T calibration positions, and W_c the column of the weight that reads it:

``wanda-sp``: the sum over the unit's columns of ``||W_c||_1 ||X_c||_2``, FLAP's structured Wanda baseline
(there the mean over rows, which orders alike). Its authors prune layer by layer to one count (our
allocation ``uniform``) and feed the pruned layer's output onward; here all layers see dense inputs. The
score is not comparable between layers: ``global`` follows the growth of the activations and empties the
first layers.

``flap``: ``m_c = var(X_c) ||W_c||_2^2`` ("WIFV"), standardised within the layer and kind (minus its mean,
over its sample standard deviation) so that layers compare, then averaged over the unit's columns; for o
it is squared before it is standardised, as in the authors' code. A KV group averages over the columns of
all its query heads. The budget of attention and FFN is ours (gamma; the authors' "AL-AM" puts both kinds into
one ranking), the variance is the unbiased one over all positions (theirs is updated by sequence), and
the bias that FLAP adds to make up for the mean of what it removed is left out, as for every saliency here.

Two reasons why both are far worse under ``global`` here than in their papers (SmolLM2-135M, sparsity 0.4;
dense perplexity 20.5 on 2 x 512 tokens of WikiText-2 test). Standardising does not survive outliers: where a
few neurons vary far more than all others, the deviation is theirs, the others lie just below zero, and
``global`` spares the whole layer (1, 2, 9 to 11, 27 and 28 keep all 1536 neurons) at the cost of the rest:
``flap`` 6010 with gamma 1 and 6432 with M/A, but 62 under ``uniform``; ``wanda-sp`` 79052 and 303087, but 57
under ``uniform`` (``taylor``: 52 ``global``, 72 ``uniform``). And the bias belongs to the method, which cuts
what varies little, not what is small: with it ``flap`` gives 69 and 109 under ``global``, 50 under
``uniform``. So use these two with ``--allocation uniform``.

Pure maths on tensors: no model, no hook.
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
