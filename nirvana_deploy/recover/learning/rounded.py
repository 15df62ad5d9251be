"""Weights that are rounded whenever they are read while they are trained: what runs later is what is trained.

The gradient of a rounded weight is given to the weight itself (straight-through: Bengio et al., arXiv
1308.3432). Codes and scales are those of ``quantize/weights/rounding.py`` without search: the scale reaches
the largest weight of its block, and so the rounded weight, rounded once more, stays what it is: by search and
by codes fitted to calibration windows, too, which find an error of zero there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.quantize.int8.rewrite import SMALLEST_DIMENSION
from nirvana_deploy.quantize.schemes import scheme_named
from nirvana_deploy.quantize.weights.rounding import code_range

_BLOCK_SIZE = 32
"""Inputs that share a scale, in four bits: the default of ``quantize``."""
_ORIGINAL = ".parametrizations.weight.original"
"""How torch ends the name of a parameter behind a parametrization."""


class _Rounded(nn.Module):
    def __init__(self, scheme: str) -> None:
        super().__init__()
        self._bits = scheme_named(scheme).weight_bits

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        block_size = weight.shape[1] if self._bits == 8 else _BLOCK_SIZE
        return weight + (
            round_rows(weight.detach(), bits=self._bits, block_size=block_size) - weight.detach()
        )


def round_rows(weight: torch.Tensor, *, bits: int, block_size: int) -> torch.Tensor:
    """The weight [N, K] that codes of ``bits`` stand for, ``block_size`` inputs of a row to a scale."""
    rows, inputs = weight.shape
    padded = nn.functional.pad(weight, (0, -inputs % block_size)).view(rows, -1, block_size)
    low, high = code_range(bits)
    scales = padded.abs().amax(-1, keepdim=True) / high
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (padded / scales).round().clamp(low, high)
    return (codes * scales).view(rows, -1)[:, :inputs]


def round_while_training(model: Any, scheme: str) -> None:
    """Round the trained weights of the linears of ``model`` whenever they are read, in place.

    They are those that ``quantize`` rounds, without the head. Raises NirvanaError for a model without any.
    """
    chosen = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and min(module.weight.shape) >= SMALLEST_DIMENSION
    ]
    if not chosen:
        raise NirvanaError(f"No linear is large enough for {scheme}: there is nothing to train for it.")
    for module in chosen:
        parametrize.register_parametrization(module, "weight", _Rounded(scheme))


def settle(model: nn.Module) -> None:
    """Leave the rounded weights in place of what was trained, in place."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def stored_name(name: str) -> str:
    """The name in the checkpoint of a parameter [that is rounded when it is read]."""
    return f"{name.removesuffix(_ORIGINAL)}.weight" if name.endswith(_ORIGINAL) else name
