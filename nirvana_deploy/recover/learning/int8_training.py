"""Linears that compute as int8 will: weights rounded when they are read, activations when they come in.

For y = W x with factors s: W s is rounded per output channel, x / s within its bound, both to int8, as
``quantize/int8/rewrite.py`` does; outlier channels are left alone. Gradients go straight through the rounding
(Bengio et al., arXiv 1308.3432), and stop where an activation is clipped. In the loop are all linears that
int8 rounds but the head; factors, ranges and outliers stay as they were decided before the training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from nirvana_deploy.quantize.int8.ranges import LEVELS
from nirvana_deploy.recover.learning.int8_decision import TrainedLinear

_LOWEST = -LEVELS - 1
"""To which QuantizeLinear clips activations."""
_SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal


class _RoundedWeight(nn.Module):
    def __init__(self, decided: TrainedLinear) -> None:
        super().__init__()
        self.register_buffer("factors", torch.from_numpy(decided.factors), persistent=False)
        self._outliers = list(decided.outliers)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        rounded = rounded_weight(weight.detach(), self.get_buffer("factors"), self._outliers)
        return weight + (rounded - weight.detach())


class _RoundedInput:
    """A forward hook."""

    def __init__(self, decided: TrainedLinear) -> None:
        self._factors = torch.from_numpy(decided.factors)
        self._scale = max(decided.bound / LEVELS, _SMALLEST_SCALE)
        self._outliers = list(decided.outliers)

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *others = inputs
        self._factors = self._factors.to(x.device)
        steps = (x / self._factors / self._scale).clamp(_LOWEST, LEVELS)
        rounded = (steps + (steps.round() - steps).detach()) * self._scale * self._factors
        if self._outliers:
            rounded[..., self._outliers] = x[..., self._outliers]
        return (rounded.to(x.dtype), *others)


def rounded_weight(weight: torch.Tensor, factors: torch.Tensor, outliers: list[int]) -> torch.Tensor:
    """W [N, K] that int8 codes of W s stand for, ``outliers`` of its columns as they are; s [K]."""
    smoothed = weight * factors
    smoothed[:, outliers] = 0.0
    scales = (smoothed.abs().amax(1, keepdim=True) / LEVELS).clamp_min(_SMALLEST_SCALE)
    rounded = (smoothed / scales).round().clamp(-LEVELS, LEVELS) * scales / factors
    rounded[:, outliers] = weight[:, outliers]
    return rounded


def compute_in_int8(model: Any, decided: dict[str, TrainedLinear]) -> None:
    """Let the linears of ``model`` compute as ``decided`` by module name, in place."""
    for name, how in decided.items():
        module = model.get_submodule(name)
        parametrize.register_parametrization(module, "weight", _RoundedWeight(how))
        module.register_forward_pre_hook(_RoundedInput(how))
