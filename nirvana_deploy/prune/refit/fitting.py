"""Fit one reader: which of its inputs stay, and with which weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.prune.refit.least_squares import NormalEquations, Refit
from nirvana_deploy.prune.refit.readers import Reader, Wanted

RIDGES = (0.3, 1.0, 3.0, 10.0)
"""Tried on held-out windows: the fewer tokens an input has, the larger the best. Below the first, what the
windows of one linear gain is lost behind the next ones (benchmarks/NOTES.md)."""
_UNSEEN_RIDGE = 1.0
"""Where there are too few windows to hold any out."""
_HELD_OUT = 16
"""One batch of so many is held out while the ridge is chosen."""

Pair = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Computes (states [n, T, D] that a reader adds to, its inputs [n, T, k])."""


@dataclass(frozen=True)
class Fit:
    """What stays of a linear."""

    kept: torch.Tensor
    """Inputs, int64, sorted."""
    weight: torch.Tensor
    """[D, kept] of the linear's dtype."""
    explained_share: float
    ridge: float
    plain: bool = False
    """Inputs went, and the plain cut was better on held-out windows."""


def fitted(
    reader: Reader,
    pairs: Sequence[Pair],
    wanted: Sequence[Wanted],
    *,
    kept: torch.Tensor | None,
    choose: Callable[[Reader, NormalEquations], torch.Tensor] | None,
    ridge: float | None,
) -> Fit:
    """Fit a reader to what is ``wanted`` of each batch; ``choose`` decides if ``kept`` is None.

    With ``ridge`` None the best of several on held-out batches is taken, and all batches then fit the linear;
    or the plain cut, if it is better there. Raises NirvanaError for inputs that are not finite.
    """
    weight = reader.linear.weight.detach()
    given = None if kept is None else kept.to(weight.device)
    held_out = max(1, len(pairs) // _HELD_OUT) if ridge is None and len(pairs) > 1 else 0
    equations = NormalEquations(weight if given is None else weight.index_select(1, given))
    unseen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, (pair, dense) in enumerate(zip(pairs, wanted, strict=True)):
        inputs, missing = _weighed(reader, pair, dense, given)
        if number < len(pairs) - held_out:
            equations.observe(inputs, missing)
        else:
            unseen.append((inputs.flatten(0, -2), missing.flatten(0, -2)))
    if kept is None:
        assert choose is not None
        kept = choose(reader, equations)
        equations = equations.only(kept.to(weight.device))
        unseen = [(inputs[:, kept.to(inputs.device)], missing) for inputs, missing in unseen]
    if ridge is None:
        ridge = _best_ridge(reader, equations, unseen) if unseen else _UNSEEN_RIDGE
    if ridge is None:
        cut = len(kept) < weight.shape[1]  # where nothing goes and nothing is missing there is no cut to name
        return Fit(kept, equations.weight.cpu(), 0.0, ridge=0.0, plain=cut)
    for inputs, missing in unseen:
        equations.observe(inputs, missing)
    refit = _finite(reader, equations.solve(ridge))
    return Fit(kept, refit.weight, refit.explained_share, ridge)


def _best_ridge(
    reader: Reader, equations: NormalEquations, unseen: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> float | None:
    """The ridge of least error on batches that are not in ``equations``; None if none beats the plain cut."""
    best, least = None, _error(equations.weight, unseen)
    for ridge in RIDGES:
        weight = _finite(reader, equations.solution(ridge)).weight
        error = _error(weight.to(equations.weight.device), unseen)
        if error < least:
            best, least = ridge, error
    return best


def _finite(reader: Reader, refit: Refit | None) -> Refit:
    """The refit; raises NirvanaError where there is none."""
    if refit is None:
        raise NirvanaError(
            f"{reader.name}: its inputs are NaN or infinite on the calibration text; nothing fits them."
        )
    return refit


def _weighed(
    reader: Reader, pair: Pair, wanted: Wanted, kept: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs that stay, what the linear should give for them), each position by its importance."""
    entered, inputs = pair()
    wanted = wanted.to(entered.device)
    bias = reader.linear.bias
    aim = reader.aim(entered, wanted)
    missing = aim if bias is None else aim - bias
    share = wanted.importance()
    return (inputs if kept is None else inputs.index_select(-1, kept)) * share, missing * share


def _error(weight: torch.Tensor, unseen: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Squared error on held-out positions."""
    return sum(float((missing - inputs @ weight.T).square().sum()) for inputs, missing in unseen)
