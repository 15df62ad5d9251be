"""The metric of a border: how the output answers to errors in the states there.

G = mean over positions of (g/w)(g/w)^T, g the gradient of log p(y) by the states, w the weight of the
position: the Fisher information in the errors that a refit counts. An error e then costs e^T G e / 2 nats.
Positions with massive states (the first token's) are left out: a few of them would decide everything.
"""

from __future__ import annotations

import torch

_MASSIVE = 5.0
"""States this many times larger than the median's are massive."""
_SHRINK = 0.05
"""Share of the mean eigenvalue that is added to all."""


class Metric:
    """Sums for G [D, D] of one border, float64."""

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(width, width, dtype=torch.float64)
        self._positions = 0

    def observe(self, gradient: torch.Tensor, weight: torch.Tensor) -> None:
        """Add gradients [n, T, D] at positions of ``weight`` [n, T, 1]."""
        size = 1 / weight.flatten()
        usual = size <= _MASSIVE * size.median()
        g = (gradient / weight).flatten(0, -2)[usual]
        self.add(g.T @ g, torch.tensor(len(g)))

    @property
    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What was observed, for :meth:`add`: sum of (g/w)(g/w)^T [D, D], number of positions []."""
        return self._sum, torch.tensor(self._positions)

    def add(self, products: torch.Tensor, positions: torch.Tensor) -> None:
        """Add the ``sums`` of other positions."""
        self._sum += products.double().cpu()
        self._positions += int(positions)

    def root(self) -> torch.Tensor | None:
        """M [D, D] with M^T M = G; None where the gradients were not finite, or all zero."""
        g = self._sum / max(self._positions, 1)
        mean = g.diagonal().mean()
        if not (g.isfinite().all() and mean > 0):
            return None
        g.diagonal().add_(_SHRINK * mean)
        root: torch.Tensor = torch.linalg.cholesky(g)
        return root.T.contiguous()
