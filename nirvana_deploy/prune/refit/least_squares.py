"""Ridge regression toward the weights that a linear has: pure maths on tensors.

W [D, k] reads X [P, k] at P positions and should give Y [P, D]; E = Y - X W^T is missing. The change Delta
that minimizes ``||E - X Delta^T||^2 + ridge * tr(Delta S Delta^T)``, S = diag(X^T X) + q mean(diag(X^T X)) I,
solves ``Delta (X^T X + ridge * S) = E^T X``; W' = W + Delta. S measures a change by its effect; q keeps quiet
inputs from large weights, which four bits in blocks cannot hold. Conditioning: benchmarks/NOTES.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nirvana_deploy.prune.refit.elimination import scales

_PANELS = 6
"""Of a Gram matrix: only those on and below the diagonal are multiplied out, 7 of 12 products."""


def panels_of(width: int) -> Iterator[tuple[int, int]]:
    """(first row, row behind the last) of the panels of a Gram matrix; its columns up to the latter count."""
    size = -(-width // _PANELS)
    for start in range(0, width, size):
        yield start, min(start + size, width)


def add_gram(gram: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x of rows x [P, k] to the symmetric ``gram`` [k, k]."""
    for start, stop in panels_of(len(gram)):
        panel = gram[start:stop, :stop]
        panel += x[:, start:stop].T @ x[:, :stop]  # in two: sums must not depend on who makes the product
        gram[:start, start:stop] = panel[:, :start].T


def raised(ridge: float, inputs: int, positions: int, *, enough: int = 1) -> float:
    """``ridge``, larger by as much as positions fall short of ``enough`` for each input.

    What is fitted to noise grows with inputs per position, and so does the best ridge.
    """
    return ridge * max(1.0, enough * inputs / max(positions, 1))


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
        self.weight = weight
        self.gram = weight.new_zeros(weight.shape[1], weight.shape[1])
        """X^T X [k, k]."""
        self.cross = torch.zeros_like(weight)
        """E^T X [D, k]."""
        self._missing = torch.zeros((), dtype=torch.float64, device=weight.device)

    def observe(self, inputs: torch.Tensor, wanted: torch.Tensor) -> None:
        """Add inputs [..., k], and what the linear should give for them [..., D], to the sums."""
        x = inputs.flatten(0, -2)
        missing = wanted.flatten(0, -2) - x @ self.weight.T
        add_gram(self.gram, x)
        self.cross += missing.T @ x
        self._missing += missing.square().sum(dtype=torch.float64)

    @property
    def sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What was observed, for :meth:`add`."""
        return self.gram, self.cross, self._missing

    def add(self, gram: torch.Tensor, cross: torch.Tensor, missing: torch.Tensor) -> None:
        """Add the ``sums`` of other positions."""
        self.gram += gram
        self.cross += cross
        self._missing += missing

    def only(self, kept: torch.Tensor) -> NormalEquations:
        """The equations of the linear without the inputs that are not in ``kept`` [k']."""
        gone = torch.ones(self.weight.shape[1], dtype=torch.bool, device=self.weight.device)
        gone[kept] = False
        lost, part = self.weight[:, gone], NormalEquations(self.weight[:, kept])
        part.gram = self.gram[kept][:, kept]
        part.cross = self.cross[:, kept] + lost @ self.gram[gone][:, kept]
        more = 2 * (lost * self.cross[:, gone]).sum() + ((lost @ self.gram[gone][:, gone]) * lost).sum()
        part._missing = self._missing + more.double()
        return part

    def solve(self, ridge: float) -> Refit | None:
        """W' on the CPU, or None if an observation was NaN or infinite; ``ridge`` must be positive.

        The weights of an input that was always zero stay. Uses up the sums.
        """
        refit = self.solution(ridge)
        self.release()
        return refit

    def release(self) -> None:
        """Let the sums go, gigabytes of a wide linear: nothing more is asked of them."""
        self.gram = self.gram.new_empty(0)
        self.cross = self.cross.new_empty(0)

    def solution(self, ridge: float) -> Refit | None:
        """As :meth:`solve`; the sums stay."""
        gram, cross, missing = self.gram.cpu(), self.cross.cpu(), float(self._missing.cpu())
        energy = gram.diagonal().double()
        if not (energy.isfinite().all() and cross.isfinite().all() and math.isfinite(missing)):
            return None
        scale = scales(energy)
        # by z = x / scale S is the identity
        system = gram.to(torch.float64, copy=True)
        system.div_(scale).div_(scale[:, None]).diagonal().add_(ridge)
        cross = cross.double() / scale
        system = system.T  # the layout of LAPACK: anything else is copied there and back
        torch.linalg.cholesky(system, out=system)
        delta = torch.cholesky_solve(cross.T, system).T
        # ||E - Z d^T||^2 = ||E||^2 - 2 <d, E^T Z> + <d G, d>, and d G = E^T Z - ridge d
        gained = float((delta * cross).sum() + ridge * delta.square().sum())
        weight = (self.weight.cpu().double() + delta / scale).to(self.weight.dtype)
        return Refit(weight=weight, explained_share=gained / missing if missing > 0 else 0.0)
