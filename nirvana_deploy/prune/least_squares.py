"""Let the inputs that a linear keeps take over what its cut ones did: least squares, one linear at a time.

A linear computes Y = X W^T from inputs X [P, C] at P positions and W [D, C]. A cut leaves it the columns k of
X; the columns c are gone, and with them E = X_c W_c^T [P, D] of the output. No new parameter is needed to
make up for it: where kept inputs are correlated with cut ones, W_k can change by Delta [D, k] so that

    J(Delta) = || E - X_k Delta^T ||^2 + ridge * tr(Delta S Delta^T),    S = diag(X_k^T X_k)

is least. Setting the gradient to zero gives the normal equations

    Delta (G + ridge * S) = E^T X_k,    G = X_k^T X_k,    W' = W_k + Delta.

The penalty pulls W' toward the plain cut and not toward zero: where the calibration text says nothing about
an input, its weights stay as they were, and for a large ``ridge`` W' is the plain cut. S, in place of the
identity, makes the answer independent of the scale of each input (a neuron twice as loud with half the
weights is the same neuron), and after the same scaling the system's condition number is at most
(k + ridge) / ridge, however much louder some inputs are than others. A bias of the linear is in both Y and
what is fitted to it and cancels: it stays.

Refitting what is left after channels are gone is He et al., Channel Pruning (arXiv 1707.06168); SparseGPT
(2301.00774), ZipLM (2302.04089) and OSSCAR (2403.12983) do it in language models, and RCPU (2510.07782)
shows how the plain fit overfits few calibration tokens. The ridge toward the cut and S are our derivation.

Pure maths on tensors: no model, no hook.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Refit:
    """A linear after the cut."""

    weight: torch.Tensor
    """W' [D, k], of the dtype that W had."""
    explained_share: float
    """1 - ||E - X_k Delta^T||^2 / ||E||^2 over the positions seen: what of the lost output is back."""


class CutLinear:
    """A linear with W [D, C], of which the columns ``kept`` (int64 [k]) stay, and sums over its inputs.

    Sums are in W's dtype; the equations are solved in float64. k x k numbers are what it holds.
    """

    def __init__(self, weight: torch.Tensor, kept: torch.Tensor) -> None:
        mask = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        self._kept = kept.to(weight.device)
        mask[self._kept] = False
        self._cut = mask.nonzero()[:, 0]
        self._weight = weight
        self._cut_weight = weight.index_select(1, self._cut)
        self._gram = weight.new_zeros(len(kept), len(kept))
        self._cross = weight.new_zeros(len(weight), len(kept))
        self._lost = torch.zeros((), dtype=torch.float64, device=weight.device)

    def observe(self, inputs: torch.Tensor) -> None:
        """Add inputs [..., C], at any number of positions, to the sums."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        kept = flat.index_select(1, self._kept)
        lost = flat.index_select(1, self._cut) @ self._cut_weight.T
        self._gram.addmm_(kept.T, kept)
        self._cross.addmm_(lost.T, kept)
        self._lost += lost.square().sum(dtype=torch.float64)

    @property
    def finite(self) -> bool:
        """Whether all that was observed is."""
        return all(bool(sums.isfinite().all()) for sums in (self._gram, self._cross, self._lost))

    def refit(self, ridge: float) -> Refit:
        """Solve for W'; ``ridge`` must be positive. An input that is always zero keeps its weights."""
        scale = self._gram.diagonal().double().sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        # by z = x / scale all diagonal entries are 1, and S is the identity
        system = self._gram.double().div_(scale).div_(scale[:, None])
        system.diagonal().add_(ridge)
        cross = self._cross.double().div_(scale)
        delta = torch.cholesky_solve(cross.T, torch.linalg.cholesky(system)).T
        # ||E - Z d^T||^2 = ||E||^2 - 2 <d, E^T Z> + <d G, d>, and d (G + ridge) = E^T Z
        gained = (delta * cross).sum() + ridge * delta.square().sum()
        explained = float(gained / self._lost) if self._lost > 0 else 0.0
        weight = self._weight.index_select(1, self._kept).double() + delta / scale
        return Refit(weight=weight.to(self._weight.dtype), explained_share=explained)
