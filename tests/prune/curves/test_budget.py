"""From curves and a budget to counts: against brute force, nested, and refused in sentences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.plans import shape_of
from builders.tiny_t5 import write_t5

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.curves.budget import (
    Budget,
    Counts,
    UnitCost,
    allocate,
    allocate_in_steps,
    hull,
    least_neurons,
    weight_cost,
)
from nirvana_deploy.prune.curves.curve import Curve, Curves, curve_of

LAYERS, GROUPS, WIDTH = 3, 4, 32
SHARES = (0.05, 0.1, 0.2, 0.3, 0.35, 0.5, 0.6, 0.7)


@pytest.fixture
def shape(tiny_llama: Path) -> ModelShape:
    """Three layers of 4 groups and 32 neurons; a group weighs as much as 16 neurons."""
    dense = shape_of(tiny_llama)
    layer = replace(dense.layers[0], kv_heads=GROUPS, query_heads=2 * GROUPS, ffn_width=WIDTH)
    return replace(dense, layers=(layer,) * LAYERS)


def curves_for(shape: ModelShape, *, seed: int = 0, convex: bool = True, step: int = 4) -> Curves:
    """Random curves, which end where a unit of each kind stays."""
    random = np.random.default_rng(seed)

    def curve(units: int, step: int, weight: int) -> Curve:
        if units == 0:
            return curve_of([0], [0])
        removed = sorted({*range(0, units - 1, step), units - 1})
        steps = random.uniform(0.1, 1, size=len(removed) - 1) * random.uniform(0.3, 3) * weight
        steps = np.sort(steps) if convex else steps
        return curve_of(removed, [0, *np.cumsum(steps)])

    return Curves(
        groups=tuple(curve(layer.kv_heads, 1, 16) for layer in shape.layers),
        neurons=tuple(curve(layer.ffn_width, step, step) for layer in shape.layers),
        facts={},
    )


def removed_cost(shape: ModelShape, counts: Sequence[Counts], cost: UnitCost) -> float:
    return sum(
        (layer.kv_heads - kept.groups) * cost.group + (layer.ffn_width - kept.neurons) * cost.neuron
        for layer, kept in zip(shape.layers, counts, strict=True)
    )


def total_cost(shape: ModelShape, cost: UnitCost) -> float:
    return removed_cost(shape, [Counts(0, 0)] * len(shape.layers), cost)


def loss_of(shape: ModelShape, curves: Curves, counts: Sequence[Counts]) -> float:
    return sum(
        groups.at(layer.kv_heads - kept.groups) + neurons.at(layer.ffn_width - kept.neurons)
        for layer, groups, neurons, kept in zip(
            shape.layers, curves.groups, curves.neurons, counts, strict=True
        )
    )


def test_the_hull_is_the_lower_convex_one() -> None:
    removed = np.array([0.0, 1, 2, 3, 4, 6])
    loss = np.array([0.0, 2, 0.9, 2.5, 2, 10])
    assert hull(removed, loss) == [0, 2, 4, 5]
    assert hull(removed[:1], loss[:1]) == [0]
    assert hull(removed[:2], loss[:2]) == [0, 1]
    assert hull(removed, removed * 2)[0] == 0 and hull(removed, removed * 2)[-1] == 5
    random = np.random.default_rng(0)
    for _ in range(20):
        loss = np.cumsum(random.uniform(0, 1, size=12))
        places = np.arange(12.0)
        corners = hull(places, loss)
        between = np.interp(places, places[corners], loss[corners])
        assert (between <= loss + 1e-12).all()
        slopes = np.diff(loss[corners]) / np.diff(places[corners])
        assert (np.diff(slopes) > 0).all()


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("round_to", [1, 8])
def test_the_budget_is_met_and_not_by_more_than_a_unit(
    shape: ModelShape, convex: bool, round_to: int
) -> None:
    cost = weight_cost(shape)
    for seed in range(5):
        curves = curves_for(shape, seed=seed, convex=convex)
        for sparsity in SHARES:
            found = allocate(shape, curves, Budget(sparsity=sparsity, round_to=round_to))
            asked = sparsity * total_cost(shape, cost)
            removed = removed_cost(shape, found.counts, cost)
            assert asked - 1e-6 <= removed < asked + max(cost.group, round_to * cost.neuron)
            assert found.predicted_kl == pytest.approx(loss_of(shape, curves, found.counts))
            for kept in found.counts:
                assert 1 <= kept.groups <= GROUPS and kept.neurons % round_to == 0


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("round_to", [1, 4, 8, 12])
def test_plans_are_nested(shape: ModelShape, convex: bool, round_to: int) -> None:
    for seed in range(5):
        curves = curves_for(shape, seed=seed, convex=convex)
        before = [Counts(GROUPS, WIDTH)] * LAYERS
        for sparsity in np.arange(0.02, 0.72, 0.02):
            counts = allocate(shape, curves, Budget(sparsity=sparsity, round_to=round_to)).counts
            for larger, smaller in zip(before, counts, strict=True):
                assert smaller.groups <= larger.groups and smaller.neurons <= larger.neurons
            before = list(counts)


@pytest.mark.parametrize("uniform", [False, True])
def test_each_of_several_steps_removes_as_much_and_keeps_what_the_next_one_keeps(
    shape: ModelShape, uniform: bool
) -> None:
    budget = Budget(sparsity=0.6, uniform=uniform, round_to=4)
    for seed in range(6):
        curves = curves_for(shape, seed=seed)
        steps = allocate_in_steps(shape, curves, budget, 4)
        assert steps[-1] == allocate(shape, curves, budget)
        for one, later in itertools.pairwise(steps):
            pairs = zip(one.counts, later.counts, strict=True)
            assert all(a.groups >= b.groups and a.neurons >= b.neurons for a, b in pairs)
            assert one.predicted_kl <= later.predicted_kl
        if not uniform:
            cost = weight_cost(shape)
            removed = [removed_cost(shape, one.counts, cost) / total_cost(shape, cost) for one in steps]
            assert removed == pytest.approx([0.15, 0.3, 0.45, 0.6], abs=0.06)


def test_on_convex_curves_nothing_that_removes_as_much_loses_less(shape: ModelShape) -> None:
    shape = replace(shape, layers=shape.layers[:2])
    cost = weight_cost(shape)
    kinds = [range(1, GROUPS + 1), range(8, WIDTH + 1, 8)] * 2
    candidates = [
        [Counts(a, b), Counts(c, d)] for a, b, c, d in itertools.product(*kinds)
    ]  # 256 of all there are
    for seed in range(6):
        curves = curves_for(shape, seed=seed, step=8)
        for sparsity in (0.15, 0.3, 0.45):
            found = allocate(shape, curves, Budget(sparsity=sparsity, round_to=8))
            removed = removed_cost(shape, found.counts, cost)
            best = min(
                loss_of(shape, curves, one) for one in candidates if removed_cost(shape, one, cost) >= removed
            )
            assert found.predicted_kl == pytest.approx(best)


def test_uniform_is_the_best_of_the_shapes_there_are(shape: ModelShape) -> None:
    cost = weight_cost(shape)
    for seed, sparsity in itertools.product(range(4), SHARES):
        curves = curves_for(shape, seed=seed, convex=False)
        found = allocate(shape, curves, Budget(sparsity=sparsity, uniform=True, round_to=4))
        assert len(set(found.counts)) == 1
        asked = sparsity * total_cost(shape, cost)
        fitting = [
            [Counts(groups, neurons)] * LAYERS
            for groups in range(1, GROUPS + 1)
            for neurons in range(4, WIDTH + 1, 4)
            if removed_cost(shape, [Counts(groups, neurons)] * LAYERS, cost) >= asked - 1e-6
        ]
        assert found.predicted_kl == pytest.approx(min(loss_of(shape, curves, one) for one in fitting))
        assert list(found.counts) in fitting


def test_another_cost_has_a_budget_of_its_own(shape: ModelShape) -> None:
    curves = curves_for(shape)
    by_weight = allocate(shape, curves, Budget(sparsity=0.3))
    for cost in (UnitCost(1.0, 2.0, "ms"), UnitCost(1000.0, 1.0, "bytes")):
        found = allocate(shape, curves, Budget(sparsity=0.3, cost=cost))
        share = removed_cost(shape, found.counts, cost) / total_cost(shape, cost)
        assert share + 1e-9 >= 0.3 and share < 0.3 + max(cost.group, 8 * cost.neuron) / total_cost(
            shape, cost
        )
        assert found.counts != by_weight.counts
    scaled = UnitCost(1e-9 * weight_cost(shape).group, 1e-9 * weight_cost(shape).neuron)
    assert allocate(shape, curves, Budget(sparsity=0.3, cost=scaled)).counts == by_weight.counts
    assert weight_cost(shape) == UnitCost(48.0 * 48, 3.0 * 48)


def test_units_that_cost_nothing_go_first(shape: ModelShape) -> None:
    curves = curves_for(shape)
    idle = curve_of([0, 16, 31], [0, 0, 5])
    curves = replace(curves, neurons=(curves.neurons[0], idle, curves.neurons[2]))
    found = allocate(shape, curves, Budget(sparsity=16 / (LAYERS * (WIDTH + 16 * GROUPS))))
    assert [kept.neurons for kept in found.counts] == [WIDTH, WIDTH - 16, WIDTH]
    assert found.predicted_kl == 0


@pytest.mark.parametrize("uniform", [True, False])
def test_minimum_widths_are_kept_to_the_end(shape: ModelShape, uniform: bool) -> None:
    curves = curves_for(shape)
    options: dict[str, Any] = {"min_groups": 2, "min_neurons": 13, "uniform": uniform}
    total = LAYERS * (WIDTH + 16 * GROUPS)
    largest = LAYERS * (16 + 2 * 16) / total
    found = allocate(shape, curves, Budget(sparsity=largest, **options))
    assert set(found.counts) == {Counts(2, 16)}
    with pytest.raises(NirvanaError) as refused:
        allocate(shape, curves, Budget(sparsity=largest + 0.01, **options))
    assert f"at most {largest:.3f}, got {largest + 0.01}" in refused.value.message
    assert "2 KV group(s) and 16 FFN neurons" in refused.value.message
    assert refused.value.hint is not None and "--sparsity 0.5 or less" in refused.value.hint
    for sparsity in (0.0, -0.1, float("nan"), 1.0):
        with pytest.raises(NirvanaError, match="sparsity must be above 0"):
            allocate(shape, curves, Budget(sparsity=sparsity, **options))


def test_least_widths() -> None:
    assert least_neurons(1536, 8) == 64
    assert least_neurons(1536, 1) == 64 and least_neurons(1537, 1) == 65
    assert least_neurons(40, 8) == 8
    assert least_neurons(6, 8) == 6
    assert least_neurons(100, 8, 50) == 56 and least_neurons(100, 8, 1000) == 100


def test_widths_are_multiples_or_the_dense_width(shape: ModelShape) -> None:
    layers = tuple(replace(shape.layers[0], ffn_width=width) for width in (32, 30, 5))
    shape = replace(shape, layers=layers)
    curves = curves_for(shape, convex=False)
    for sparsity in SHARES:
        found = allocate(shape, curves, Budget(sparsity=sparsity))
        for kept, layer in zip(found.counts, shape.layers, strict=True):
            assert kept.neurons in (layer.ffn_width, *range(8, layer.ffn_width, 8))


def test_uniform_needs_layers_that_are_alike(shape: ModelShape) -> None:
    layers = (replace(shape.layers[0], ffn_width=40), *shape.layers[1:])
    other = replace(shape, layers=layers)
    with pytest.raises(NirvanaError, match="needs a model whose layers are all alike"):
        allocate(other, curves_for(other), Budget(sparsity=0.2, uniform=True))


@pytest.mark.parametrize("uniform", [True, False])
def test_cross_attentions_have_no_ffn_to_cut(tmp_path: Path, uniform: bool) -> None:
    shape = shape_of(write_t5(tmp_path, "t5"))
    curves, cost = curves_for(shape), weight_cost(shape)
    for sparsity in (0.1, 0.3, 0.5):
        found = allocate(shape, curves, Budget(sparsity=sparsity, uniform=uniform))
        assert [not kept.neurons for kept in found.counts] == [not one.ffn_width for one in shape.layers]
        assert removed_cost(shape, found.counts, cost) >= sparsity * total_cost(shape, cost) - 1e-6


def test_of_a_segment_of_groups_no_more_go_than_are_wanted(shape: ModelShape) -> None:
    curves = curves_for(shape)
    steep = curve_of([0, 1, 2, 3], [0, 0.002, 0.0029, 0.003])  # concave: one segment
    curves = replace(curves, groups=(steep, *curves.groups[1:]))
    found = allocate(shape, curves, Budget(sparsity=16 / (LAYERS * (WIDTH + 16 * GROUPS))))
    assert [kept.groups for kept in found.counts] == [GROUPS - 1, GROUPS, GROUPS]
    assert found.predicted_kl == pytest.approx(0.002)


def test_nothing_is_cut_beyond_the_end_of_a_curve(shape: ModelShape) -> None:
    """A curve says nothing of what lies behind it, which is not for free."""
    curves = curves_for(shape)
    short = curve_of([0, 4], [0, 0.01])
    curves = replace(curves, neurons=(short, *curves.neurons[1:]))
    for sparsity in SHARES[:6]:
        found = allocate(shape, curves, Budget(sparsity=sparsity, round_to=4))
        assert found.counts[0].neurons >= WIDTH - 4
