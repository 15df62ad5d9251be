"""Ridge regression toward the weights that a linear has: pure maths on tensors.

W [D, k] reads X [P, k] at P positions and should give Y [P, D]; E = Y - X W^T is missing. The change Delta
that minimizes ``||E - X Delta^T||^2 + ridge * tr(Delta S Delta^T)``, S = diag(X^T X) + q mean(diag(X^T X)) I,
solves ``Delta (X^T X + ridge * S) = E^T X``; W' = W + Delta. S measures a change by its effect; q keeps quiet
inputs from large weights, which four bits in blocks cannot hold. Conditioning: benchmarks/NOTES.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_QUIET_SHARE = 0.1
"""q: share of the mean energy that S adds to each input's own."""


@dataclass(frozen=True)
class Refit:
    """A refitted linear."""

    weight: torch.Tensor
    """W' [D, k], of the dtype that W had."""
    explained_share: float
    """1 - ||E - X Delta^T||^2 / ||E||^2 over the positions seen: how much of what was missing is restored."""


class NormalEquations:
    """Sums over positions for a linear with W [D, k]: k (k + D) numbers, however many positions.

    Sums are in W's dtype; the equations are solved in float64.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self._gram = weight.new_zeros(weight.shape[1], weight.shape[1])
        self._cross = torch.zeros_like(weight)
        self._missing = torch.zeros((), dtype=torch.float64, device=weight.device)

    def observe(self, inputs: torch.Tensor, wanted: torch.Tensor) -> None:
        """Add inputs [..., k], and what the linear should give for them [..., D], to the sums."""
        x = inputs.flatten(0, -2)
        missing = wanted.flatten(0, -2) - x @ self._weight.T
        self._gram.addmm_(x.T, x)
        self._cross.addmm_(missing.T, x)
        self._missing += missing.square().sum(dtype=torch.float64)

    def solve(self, ridge: float) -> Refit | None:
        """W' on the CPU, or None if an observation was NaN or infinite; ``ridge`` must be positive.

        The weights of an input that was always zero stay. Uses up the sums.
        """
        gram, cross, missing = self._gram.cpu(), self._cross.cpu(), float(self._missing.cpu())
        self._gram = self._gram.new_empty(0)  # k x k is the largest thing here: one copy at a time
        energy = gram.diagonal().double()
        if not (energy.isfinite().all() and cross.isfinite().all() and math.isfinite(missing)):
            return None
        scale = (energy + _QUIET_SHARE * energy.mean()).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        system = gram.double()
        del gram
        # by z = x / scale S is the identity
        system.div_(scale).div_(scale[:, None]).diagonal().add_(ridge)
        cross = cross.double().div_(scale)
        torch.linalg.cholesky(system, out=system)
        delta = torch.cholesky_solve(cross.T, system).T
        # ||E - Z d^T||^2 = ||E||^2 - 2 <d, E^T Z> + <d G, d>, and d G = E^T Z - ridge d
        gained = float((delta * cross).sum() + ridge * delta.square().sum())
        weight = (self._weight.cpu().double() + delta / scale).to(self._weight.dtype)
        return Refit(weight=weight, explained_share=gained / missing if missing > 0 else 0.0)
