"""Normal equations of fewer inputs, and at several ridges; single solutions: test_reconstruct.py."""

from __future__ import annotations

import pytest
import torch

from nirvana_deploy.prune.refit.elimination import scales
from nirvana_deploy.prune.refit.least_squares import NormalEquations, raised


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [60, 8], a weight [5, 8], and what it should give [60, 5]; float64."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = random(60, 8) @ random(8, 8) * torch.logspace(-1, 1, 8)
    weight = random(5, 8)
    return inputs, weight, inputs @ (weight + 0.1 * random(5, 8)).T + 0.1 * random(60, 5)


def observed(inputs: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor) -> NormalEquations:
    equations = NormalEquations(weight)
    for x, y in zip(inputs.split(13), wanted.split(13), strict=True):
        equations.observe(x[None], y[None])
    return equations


@pytest.mark.parametrize("kept", [[0, 3, 4, 7], [5], list(range(8))])
def test_fewer_inputs_as_if_only_they_had_been_observed(kept: list[int]) -> None:
    inputs, weight, wanted = case()
    part = observed(inputs, weight, wanted).only(torch.tensor(kept))
    alone = observed(inputs[:, kept], weight[:, kept], wanted)
    torch.testing.assert_close(part.weight, alone.weight)
    torch.testing.assert_close(part.gram, alone.gram)
    torch.testing.assert_close(part.cross, alone.cross)
    one, other = part.solve(0.1), alone.solve(0.1)
    assert one is not None and other is not None
    torch.testing.assert_close(one.weight, other.weight)
    # the only witness of the sum of what was missing
    assert one.explained_share == pytest.approx(other.explained_share, rel=1e-9)


def test_taking_part_leaves_the_whole_as_it_was() -> None:
    whole, untouched = observed(*case()), observed(*case())
    whole.only(torch.tensor([1, 2])).solve(0.1)
    one, other = whole.solve(0.1), untouched.solve(0.1)
    assert one is not None and other is not None and torch.equal(one.weight, other.weight)


def test_at_every_ridge_the_gradient_is_zero_and_the_solution_that_of_solve() -> None:
    inputs, weight, wanted = case()
    ridges, equations = (0.1, 0.3, 3.0, 0.1), observed(inputs, weight, wanted)
    found = [equations.solution(ridge) for ridge in ridges]  # the sums stay
    scale = scales(inputs.square().sum(0))
    for ridge, refit in zip(ridges, found, strict=True):
        assert refit is not None
        solution = refit.weight.clone().requires_grad_()
        objective = (wanted - inputs @ solution.T).square().sum()
        objective = objective + ridge * ((solution - weight) * scale).square().sum()
        (gradient,) = torch.autograd.grad(objective, solution)
        assert gradient.abs().max() < 1e-11 * (weight.abs() @ (inputs.T @ inputs).abs()).max()
        alone = observed(inputs, weight, wanted).solve(ridge)
        assert alone is not None and torch.equal(alone.weight, refit.weight)
        assert alone.explained_share == refit.explained_share
    shares = [refit.explained_share for refit in found if refit is not None]
    assert shares[0] == shares[3] > shares[1] > shares[2]
    one, more = equations.solve(0.3), inputs[:5]
    equations = observed(inputs, weight, wanted)
    equations.solution(1.0)
    equations.observe(more, 2 * wanted[:5])  # and may grow
    twice = observed(torch.cat([inputs, more]), weight, torch.cat([wanted, 2 * wanted[:5]])).solve(0.3)
    grown = equations.solve(0.3)
    assert one is not None and grown is not None and twice is not None
    torch.testing.assert_close(grown.weight, twice.weight)
    assert (grown.weight - one.weight).abs().max() > 1e-4


def test_observations_that_are_not_finite_have_no_solutions() -> None:
    inputs, weight, wanted = case()
    inputs[3, 2] = torch.inf
    equations = observed(inputs, weight, wanted)
    assert equations.solution(0.1) is None and equations.solve(0.1) is None


def test_a_ridge_grows_as_positions_fall_short() -> None:
    assert raised(0.3, 100, 100) == raised(0.3, 100, 1000) == 0.3
    assert raised(0.3, 100, 25) == pytest.approx(1.2)
    assert raised(0.02, 1536, 7680, enough=5) == 0.02  # SmolLM2 as it is drawn
    assert raised(0.02, 14336, 7680, enough=5) == pytest.approx(0.02 * 9.33, rel=1e-3)


def test_the_raised_ridge_is_nearer_to_the_truth_where_positions_are_few() -> None:
    generator = torch.Generator().manual_seed(1)
    truth, errors = torch.randn(3, 200, generator=generator).double(), {}
    weight = truth + 0.1 * torch.randn(3, 200, generator=generator).double()
    inputs = torch.randn(40, 200, generator=generator).double()
    wanted = inputs @ truth.T + torch.randn(40, 3, generator=generator).double()
    for ridge in (0.3, raised(0.3, 200, 40)):
        refit = observed(inputs, weight, wanted).solve(ridge)
        assert refit is not None
        errors[ridge] = float((refit.weight - truth).square().sum())
    assert errors[raised(0.3, 200, 40)] < errors[0.3]
