"""Fit one reader: which of its inputs stay, and with which weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.prune.refit.least_squares import NormalEquations, Refit
from nirvana_deploy.prune.refit.readers import Reader, Wanted
from nirvana_deploy.prune.streaming.processes import Share, is_first

RIDGES = (0.3, 1.0, 3.0, 10.0)
"""Tried on held-out windows: the fewer tokens an input has, the larger the best. Below the first, what the
windows of one linear gain is lost behind the next ones (benchmarks/NOTES.md)."""
_UNSEEN_RIDGE = 1.0
"""Where there are too few windows to hold any out."""
_HELD_OUT = 16
"""One batch of so many is held out while the ridge is chosen."""

Pair = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Computes (states [n, T, D] that a reader adds to, its inputs [n, T, k])."""
Choose = Callable[[Reader, NormalEquations], torch.Tensor]
"""The inputs that stay of a reader, sorted, from the sums over all of its inputs on the repaired prefix."""
_Observed = tuple[torch.Tensor, torch.Tensor]
"""(inputs [P, k], what the linear should give for them [P, D])."""


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

    @property
    def tensors(self) -> list[torch.Tensor]:
        """For other processes."""
        numbers = torch.tensor([self.explained_share, self.ridge, self.plain], dtype=torch.float64)
        return [self.kept, self.weight, numbers]

    @classmethod
    def from_tensors(cls, tensors: Sequence[torch.Tensor]) -> Fit:
        """Of the ``tensors`` of another one."""
        kept, weight, (explained_share, ridge, plain) = tensors[0], tensors[1], tensors[2].tolist()
        return cls(kept, weight, explained_share, ridge, bool(plain))


def fitted(
    reader: Reader,
    pairs: Sequence[Pair],
    wanted: Sequence[Wanted],
    *,
    kept: torch.Tensor | None,
    choose: Choose | None,
    ridge: float | None,
    share: Share,
) -> Fit:
    """Fit a reader to what is ``wanted`` of each batch; ``choose`` decides if ``kept`` is None.

    With ``ridge`` None the best of several on held-out batches is taken, and all batches then fit the linear;
    or the plain cut, if it is better there. The first process does, with what all of them observed. Raises
    NirvanaError for inputs that are not finite.
    """
    equations, unseen = _observed(reader, pairs, wanted, kept, share, hold_out=ridge is None)
    found = _solved(reader, equations, unseen, kept, choose, ridge) if is_first() else None
    if found is not None:
        share.from_first(found.tensors)
    return found or Fit.from_tensors(share.from_first(None))


def _observed(
    reader: Reader,
    pairs: Sequence[Pair],
    wanted: Sequence[Wanted],
    kept: torch.Tensor | None,
    share: Share,
    *,
    hold_out: bool,
) -> tuple[NormalEquations, list[_Observed]]:
    """The sums over all batches but some, which are held out, in the first process."""
    weight = reader.linear.weight.detach()
    given = None if kept is None else kept.to(weight.device)
    narrow = weight if given is None else weight.index_select(1, given)
    used = share.batches - (max(1, share.batches // _HELD_OUT) if hold_out and share.batches > 1 else 0)
    equations, unseen = NormalEquations(narrow), []
    for number, batch in share.turns(list(zip(pairs, wanted, strict=True))):
        own: Sequence[torch.Tensor] | None = None
        if batch is not None:
            inputs, missing = _weighed(reader, *batch, given)
            if number >= used:
                own = inputs.flatten(0, -2), missing.flatten(0, -2)
            else:
                adding = equations if is_first() else NormalEquations(narrow)
                adding.observe(inputs, missing)
                own = adding.sums
        for sender, found in share.gathered(number, own):
            if sender >= used:
                unseen.append((found[0], found[1]))
            elif sender != number:
                equations.add(*found)
    return equations, unseen


def _solved(
    reader: Reader,
    equations: NormalEquations,
    unseen: list[_Observed],
    kept: torch.Tensor | None,
    choose: Choose | None,
    ridge: float | None,
) -> Fit:
    weight = reader.linear.weight.detach()
    if kept is None:
        assert choose is not None
        kept = choose(reader, equations)
        whole, equations = equations, equations.only(kept.to(weight.device))
        whole.release()
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


def _best_ridge(reader: Reader, equations: NormalEquations, unseen: Sequence[_Observed]) -> float | None:
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


def _error(weight: torch.Tensor, unseen: Sequence[_Observed]) -> float:
    """Squared error on held-out positions."""
    return sum(float((missing - inputs @ weight.T).square().sum()) for inputs, missing in unseen)
