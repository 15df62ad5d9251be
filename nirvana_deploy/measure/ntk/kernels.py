"""Tangent kernels of a few windows, and what a cut takes of them: pure maths on gradients.

One Adam step on window x_j moves f(x_i) by about ``-eta * l'(x_j) * K[i, j]`` with the Adam kernel ``K[i,
j] = <g_i, sign g_j>``, ``g_i = df(x_i)/dw`` over the prunable weights; its diagonal is ``|g_i|_1``. The
plain kernel ``<g_i, g_j>`` is that of gradient descent. A cut removes the weights P and keeps Q: ``K - K' =
K_P + (K_Q - K'_Q)``, where K_P follows from the dense gradients. Derivation: benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.prune.saliency.units import Kept

_BLOCK_WEIGHTS = 1 << 18
Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Kernels:
    """Both kernels of n windows over some set of weights."""

    adam: Matrix
    """[n, n]: <g_i, sign g_j>; row i is the window whose output moves."""
    plain: Matrix
    """[n, n]: <g_i, g_j>."""

    def __add__(self, other: Kernels) -> Kernels:
        return Kernels(adam=self.adam + other.adam, plain=self.plain + other.plain)

    def __sub__(self, other: Kernels) -> Kernels:
        return Kernels(adam=self.adam - other.adam, plain=self.plain - other.plain)


def no_kernels(windows: int) -> Kernels:
    """Return kernels over no weights."""
    return Kernels(adam=np.zeros((windows, windows)), plain=np.zeros((windows, windows)))


def kernels_of(gradients: Sequence[torch.Tensor]) -> Kernels:
    """Return the kernels over the weights of one tensor; each of the n ``gradients`` has its shape."""
    total = no_kernels(len(gradients))
    for block in _blocks(gradients):
        total += _block_kernels(block)
    return total


def _blocks(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield tensors of one shape as rows of float64 blocks [rows, at most ``_BLOCK_WEIGHTS``]."""
    rows = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, rows[0].numel(), _BLOCK_WEIGHTS):
        yield torch.stack([row[start : start + _BLOCK_WEIGHTS] for row in rows]).double()


def _block_kernels(block: torch.Tensor) -> Kernels:
    return Kernels(adam=(block @ block.sign().T).numpy(), plain=(block @ block.T).numpy())


@dataclass(frozen=True)
class Removed:
    """Share of the removed weights P in kernels and outputs, from the dense model's gradients alone."""

    kernels: Kernels
    """K_P; the diagonal of its ``adam`` is the trainability term sum_P |g_i|."""
    saliency: Vector
    """[n]: the zero-shot term sum_P |w * g_i|."""
    change: Vector
    """[n]: sum_C w * g_i over the removed output columns C, the first-order prediction of f - f'."""

    def __add__(self, other: Removed) -> Removed:
        return Removed(
            self.kernels + other.kernels, self.saliency + other.saliency, self.change + other.change
        )


def removed_part(weight: torch.Tensor, gradients: Sequence[torch.Tensor], kept: Kept | None) -> Removed:
    """What removing all of one tensor but ``kept`` takes; None stands for the whole tensor.

    What is kept along dimension 1 is kept of a unit's output columns; only those enter ``change``.
    """
    if kept is not None:
        gone = torch.ones(weight.shape[kept.dimension], dtype=torch.bool)
        gone[kept.positions] = False
        positions = gone.nonzero()[:, 0]
        weight = weight.index_select(kept.dimension, positions)
        gradients = [gradient.index_select(kept.dimension, positions) for gradient in gradients]
    windows = len(gradients)
    kernels, saliency, change = no_kernels(windows), np.zeros(windows), np.zeros(windows)
    for rows in _blocks([weight, *gradients]):
        weights, block = rows[0], rows[1:]
        kernels += _block_kernels(block)
        saliency += (block.abs() @ weights.abs()).numpy()
        if kept is not None and kept.dimension == 1:
            change += (block @ weights).numpy()
    return Removed(kernels=kernels, saliency=saliency, change=change)
