"""The growth that elimination predicts is that of a fresh refit without the inputs, by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from nirvana_deploy.prune.refit.elimination import (
    Elimination,
    Optimum,
    eliminate,
    eliminate_groups,
    group_inputs,
    optimum_of,
    scales,
)

INPUTS, OUTPUTS, POSITIONS = 24, 5, 200
EXACT = 1e-6


@dataclass(frozen=True)
class Case:
    """Inputs X [P, k], correlated and of unlike scale; what they should give Y [P, D]; W [D, k]; M [E, D]."""

    inputs: torch.Tensor
    wanted: torch.Tensor
    weight: torch.Tensor
    metric: torch.Tensor
    ridge: float = 0.02

    def optimum(self) -> Optimum:
        found = optimum_of(
            self.inputs.T @ self.inputs,
            self.weight,
            missing=(self.wanted - self.inputs @ self.weight.T).T @ self.inputs,
            metric=self.metric,
            ridge=self.ridge,
        )
        assert found is not None
        return found

    def objective(self, kept: Sequence[int]) -> float:
        """``sum |M (y - W x)|^2 + ridge |M (z - z_0)|^2`` at its least with only ``kept`` there, by lstsq."""
        scale = scales(self.inputs.square().sum(0))
        x, start = self.inputs / scale, self.weight * scale
        stay = list(kept)
        stacked = torch.cat([x[:, stay], self.ridge**0.5 * torch.eye(len(stay), dtype=x.dtype)])
        target = torch.cat([self.wanted, self.ridge**0.5 * start[:, stay].T])
        refit = torch.zeros_like(start)
        refit[:, stay] = torch.linalg.lstsq(stacked, target).solution.T
        misses = (self.wanted - x @ refit.T) @ self.metric.T
        moved = self.metric @ (refit - start)
        return float(misses.square().sum() + self.ridge * moved.square().sum())

    def growth(self, gone: Sequence[int]) -> float:
        """How much the objective grows without ``gone``."""
        width = self.inputs.shape[1]
        return self.objective([i for i in range(width) if i not in set(gone)]) - self.objective(range(width))


def case(*, inputs: int = INPUTS, seed: int = 0, ridge: float = 0.02) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = random(POSITIONS, inputs) @ random(inputs, inputs) * torch.logspace(-1, 0, inputs).double()
    weight = random(OUTPUTS, inputs)
    return Case(x, x @ weight.T + 0.3 * random(POSITIONS, OUTPUTS), weight, random(7, OUTPUTS), ridge)


def assert_steps_are_refits(one: Case, found: Elimination) -> None:
    for removed, cost in zip(found.removed[1:], found.cost[1:], strict=True):
        assert cost == pytest.approx(one.growth(found.order[:removed].tolist()), rel=EXACT, abs=1e-9)


@pytest.mark.parametrize("ridge", [1e-4, 0.02, 1.0])
def test_single_inputs_cost_what_a_refit_without_them_costs(ridge: float) -> None:
    one = case(ridge=ridge)
    found = eliminate(one.optimum(), keep=4, block=1)
    assert_steps_are_refits(one, found)
    gone: list[int] = []
    for step in range(4):  # and each is the cheapest there is
        growths = {i: one.growth([*gone, i]) for i in range(INPUTS) if i not in gone}
        gone.append(min(growths, key=growths.__getitem__))
        assert int(found.order[step]) == gone[-1]


@pytest.mark.parametrize("block", [2, 3, 7])
def test_blocks_cost_what_a_refit_without_them_costs(block: int) -> None:
    one = case(seed=1)
    found = eliminate(one.optimum(), keep=3, block=block)
    assert_steps_are_refits(one, found)
    assert found.removed == [*range(0, INPUTS - 3, block), INPUTS - 3]


def test_without_missing_and_metric_outputs_are_those_of_the_weight() -> None:
    plain = case()
    plain = Case(plain.inputs, plain.inputs @ plain.weight.T, plain.weight, torch.eye(OUTPUTS).double())
    optimum = optimum_of(plain.inputs.T @ plain.inputs, plain.weight)
    assert optimum is not None
    assert_steps_are_refits(plain, eliminate(optimum, keep=6, block=2))


def test_costs_ascend_orders_are_nested_and_exactly_so_many_stay() -> None:
    for keep in (0, 1, 10, 17, INPUTS):
        found = eliminate(case().optimum(), keep=keep, block=3)
        assert len(found.kept) == keep and found.removed[-1] == INPUTS - keep
        assert found.kept.tolist() == sorted(set(range(INPUTS)) - set(found.order.tolist()))
        assert len(set(found.order.tolist())) == INPUTS - keep
        assert found.removed[0] == 0 and found.cost[0] == 0 and len(found.cost) == len(found.removed)
        assert found.cost == sorted(found.cost)
    deep = eliminate(case().optimum(), keep=3, block=3)
    shallow = eliminate(case().optimum(), keep=12, block=3)
    assert deep.order[:12].tolist() == shallow.order.tolist()
    assert deep.cost[:5] == shallow.cost


def test_dead_inputs_go_first_and_cost_nothing() -> None:
    alive = case()
    dead = [2, 3, 11, 23]
    x = alive.inputs.clone()
    x[:, dead] = 0
    one = Case(x, alive.wanted, alive.weight, alive.metric)
    found = eliminate(one.optimum(), keep=10, block=1)
    assert sorted(found.order[:4].tolist()) == dead
    assert found.cost[:5] == [0.0] * 5 and found.cost[5] > 0
    held = one.weight.clone()
    held[:, dead] = 0  # what no input reads need not be held on to
    assert_steps_are_refits(Case(x, one.wanted, held, one.metric), found)
    nothing = optimum_of(torch.zeros(4, 4), torch.ones(2, 4))
    assert nothing is not None and eliminate(nothing, keep=1, block=1).cost[-1] == 0


def test_a_singular_gram_is_no_obstacle() -> None:
    one = case()
    x = one.inputs[:, :1] * torch.linspace(1, 2, INPUTS).double()  # rank 1
    twins = Case(x, x @ one.weight.T, one.weight, one.metric)
    assert_steps_are_refits(twins, eliminate(twins.optimum(), keep=2, block=2))


@pytest.mark.parametrize("groups", [2, 3, 4, 6])
def test_of_few_groups_the_best_subset_goes(groups: int) -> None:
    one = case(seed=2)
    kept, cost = eliminate_groups(one.optimum(), groups)
    assert kept[0] == tuple(range(groups)) and cost[0] == 0 and len(kept) == len(cost) == groups
    for removed in range(1, groups):
        growths = {
            gone: one.growth(group_inputs(gone, groups, INPUTS).tolist())
            for gone in itertools.combinations(range(groups), removed)
        }
        best = min(growths, key=growths.__getitem__)
        assert kept[removed] == tuple(sorted(set(range(groups)) - set(best)))
        assert cost[removed] == pytest.approx(growths[best], rel=EXACT)
    assert cost == sorted(cost)


def test_of_many_groups_the_cheapest_goes_one_after_another() -> None:
    one, groups = case(seed=3), 12  # from 66 pairs on they are not all tried
    kept, cost = eliminate_groups(one.optimum(), groups, most=4)
    gone: list[int] = []
    for removed in range(1, 5):
        growths = {
            group: one.growth(group_inputs([*gone, group], groups, INPUTS).tolist())
            for group in range(groups)
            if group not in gone
        }
        gone.append(min(growths, key=growths.__getitem__))
        assert kept[removed] == tuple(group for group in range(groups) if group not in gone)
        assert cost[removed] == pytest.approx(growths[gone[-1]], rel=EXACT)
    assert len(kept) == 5


def test_inputs_of_groups_are_consecutive() -> None:
    assert group_inputs([0, 2], 3, 12).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_give_no_optimum(bad: float) -> None:
    gram, weight = torch.eye(3), torch.ones(2, 3)
    missing = torch.zeros(2, 3)
    missing[0, 1] = bad
    assert optimum_of(gram, weight, missing=missing) is None
    gram[1, 1] = bad
    assert optimum_of(gram, weight) is None


def test_the_sums_that_are_given_stay() -> None:
    given = [torch.eye(3).double() * 2, torch.ones(2, 3).double(), torch.ones(2, 3).double()]
    copies = [one.clone() for one in given]
    optimum_of(given[0], given[1], missing=given[2])
    assert all(torch.equal(one, copy) for one, copy in zip(given, copies, strict=True))
