"""One reader: what is held out decides the ridge, or that the plain cut stays."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.prune.refit.fitting import RIDGES, Fit, Pair, fitted
from nirvana_deploy.prune.refit.least_squares import NormalEquations
from nirvana_deploy.prune.refit.readers import Reader, Wanted, importance
from nirvana_deploy.prune.streaming.processes import Share

INPUTS, OUTPUTS = 10, 6
KEPT = torch.tensor([0, 1, 3, 4, 6, 8])
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""States that enter [n, T, D], inputs [n, T, k], states that are wanted [n, T, D]."""


def reader_of(*, bias: bool = True) -> Reader:
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS, bias=bias).requires_grad_(False)
    return Reader("layer.down.weight", 0, linear, nn.Identity(), None, None)


def batches_of(reader: Reader, count: int, *, positions: int = 12, other: bool = False) -> list[Batch]:
    """Correlated inputs, and dense states of them; an ``other`` distribution is of the last batch."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(4, INPUTS, generator=generator)
    found = []
    for number in range(count):
        sources = torch.randn(2, positions, 4, generator=generator)
        x = sources @ (-mixing.flip(1) if other and number == count - 1 else mixing)
        x = x + 0.3 * torch.randn(2, positions, INPUTS, generator=generator)
        entered = torch.randn(2, positions, OUTPUTS, generator=generator)
        found.append((entered, x, entered + reader.linear(x)))
    return found


def fit(
    reader: Reader, batches: Sequence[Batch], *, ridge: float | None = None, kept: torch.Tensor = KEPT
) -> Fit:
    return fitted(
        reader,
        _pairs(batches),
        [Wanted(b[2]) for b in batches],
        kept=kept,
        choose=None,
        ridge=ridge,
        share=Share(len(batches)),
    )


def _pairs(batches: Sequence[Batch]) -> list[Pair]:
    return [lambda batch=batch: batch[:2] for batch in batches]  # type: ignore[misc]


def error(reader: Reader, weight: torch.Tensor, batches: Sequence[Batch]) -> float:
    """Squared error of states, each relative to its size."""
    total, bias = 0.0, reader.linear.bias
    for entered, x, wanted in batches:
        states = entered + x[..., KEPT] @ weight.T + (0 if bias is None else bias)
        total += float(((wanted - states) * importance(wanted)).square().sum())
    return total


def by_hand(reader: Reader, batches: Sequence[Batch], ridge: float) -> torch.Tensor:
    equations = NormalEquations(reader.linear.weight[:, KEPT])
    for entered, x, wanted in batches:
        share = importance(wanted)
        bias = 0 if reader.linear.bias is None else reader.linear.bias
        equations.observe(x[..., KEPT] * share, (wanted - entered - bias) * share)
    refit = equations.solve(ridge)
    assert refit is not None
    return refit.weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("count", "positions"), [(2, 12), (5, 3), (40, 4)])
def test_the_best_ridge_on_held_out_windows_is_taken(bias: bool, count: int, positions: int) -> None:
    reader = reader_of(bias=bias)
    batches = batches_of(reader, count, positions=positions)
    held_out = 1 if count < 32 else 2
    seen, unseen = batches[:-held_out], batches[-held_out:]
    tried = {ridge: error(reader, by_hand(reader, seen, ridge), unseen) for ridge in RIDGES}
    best = min(tried, key=tried.__getitem__)
    found = fit(reader, batches)
    assert found.ridge == best and not found.plain and found.explained_share > 0
    torch.testing.assert_close(found.weight, by_hand(reader, batches, best))  # then all windows fit
    plain = reader.linear.weight[:, KEPT]
    assert tried[best] < error(reader, plain, unseen)
    assert error(reader, found.weight, unseen) < error(reader, plain, unseen)


def test_the_plain_cut_stays_where_no_refit_is_better() -> None:
    reader = reader_of()
    batches = batches_of(reader, 3, other=True)
    plain = reader.linear.weight[:, KEPT]
    unseen = batches[-1:]
    refits = [by_hand(reader, batches[:-1], ridge) for ridge in RIDGES]
    assert min(error(reader, one, unseen) for one in refits) > error(reader, plain, unseen)
    found = fit(reader, batches)
    assert found.plain and torch.equal(found.weight, plain)
    assert (found.ridge, found.explained_share) == (0.0, 0.0)


def test_a_ridge_that_is_given_is_fitted_to_all_windows() -> None:
    reader = reader_of()
    batches = batches_of(reader, 3, other=True)
    found = fit(reader, batches, ridge=0.3)
    torch.testing.assert_close(found.weight, by_hand(reader, batches, 0.3))
    assert (found.weight - by_hand(reader, batches[:-1], 0.3)).abs().max() > 1e-3
    assert found.ridge == 0.3 and not found.plain


def test_a_single_batch_holds_nothing_out() -> None:
    reader = reader_of()
    batches = batches_of(reader, 1)
    found = fit(reader, batches)
    assert found.ridge == 1.0
    torch.testing.assert_close(found.weight, by_hand(reader, batches, 1.0))


def test_what_is_chosen_is_fitted_as_if_it_had_been_given() -> None:
    reader = reader_of()
    batches = batches_of(reader, 4)

    def choose(chosen: Reader, equations: NormalEquations) -> torch.Tensor:
        assert chosen is reader and equations.weight.shape == (OUTPUTS, INPUTS)
        return KEPT

    wanted = [Wanted(batch[2]) for batch in batches]
    share = Share(len(batches))
    found = fitted(reader, _pairs(batches), wanted, kept=None, choose=choose, ridge=None, share=share)
    given = fit(reader, batches)
    torch.testing.assert_close(found.weight, given.weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.kept, KEPT) and found.ridge == given.ridge
    assert found.explained_share == pytest.approx(given.explained_share, rel=1e-4)


@pytest.mark.parametrize("ridge", [None, 1.0])
def test_inputs_that_are_not_finite_name_the_linear(ridge: float | None) -> None:
    reader = reader_of()
    batches = batches_of(reader, 3)
    batches[0][1][0, 2, 3] = torch.nan
    with pytest.raises(NirvanaError, match=r"layer\.down\.weight: its inputs are NaN or infinite"):
        fit(reader, batches, ridge=ridge)
