"""The arrow scores -> plan: budgets to the unit, NIRVANA's check values, stable bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders.plans import plan_for

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.families import FAMILIES, shape_from_config
from nirvana_deploy.model.shape import LayerShape, ModelShape
from nirvana_deploy.prune.allocation import kept_units, whole
from nirvana_deploy.prune.plan import (
    check_plan_fits,
    default_gamma,
    largest_sparsity,
    make_plan,
    pruned_shape,
    removed_counts,
)
from nirvana_deploy.prune.plan_file import read_plan, write_plan
from nirvana_deploy.prune.saliency.units import UnitScores


def llama_shape(*, layers: int, hidden: int, heads: int, kv_heads: int, d: int, ffn: int) -> ModelShape:
    layer = LayerShape(query_heads=heads, kv_heads=kv_heads, ffn_width=ffn)
    return ModelShape(
        family=FAMILIES["llama"],
        hidden_size=hidden,
        vocab_size=1000,
        head_dim=d,
        layers=(layer,) * layers,
        tied_embeddings=False,
        attention_bias=False,
        output_bias=False,
        ffn_bias=False,
    )


def shape_of_config(*, layers: int, hidden: int, heads: int, ffn: int, tied: bool) -> ModelShape:
    """From the fields of a config.json, without weights."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256}
    return shape_from_config(
        config
        | {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "head_dim": 128}
        | {"num_attention_heads": heads, "num_key_value_heads": 8, "tie_word_embeddings": tied}
    )


LLAMA_8B = shape_of_config(layers=32, hidden=4096, heads=32, ffn=14336, tied=False)
LLAMA_3B = shape_of_config(layers=28, hidden=3072, heads=24, ffn=8192, tied=True)
SMALL = llama_shape(layers=4, hidden=64, heads=8, kv_heads=4, d=8, ffn=96)


def random_scores(shape: ModelShape, seed: int = 0, *, decimals: int | None = None) -> UnitScores:
    generator = np.random.default_rng(seed)

    def draw(size: int) -> np.ndarray:
        scores = generator.random(size)
        return scores if decimals is None else scores.round(decimals)

    return UnitScores(
        groups=tuple(draw(layer.kv_heads) for layer in shape.layers),
        neurons=tuple(draw(layer.ffn_width) for layer in shape.layers),
    )


@pytest.mark.parametrize(
    ("shape", "gamma", "sparsity", "groups", "neurons"),
    [
        (LLAMA_8B, 3.36, 0.2, 17, 106078),
        (LLAMA_8B, 3.36, 0.4, 35, 212157),
        (LLAMA_8B, 3.36, 0.5, 44, 265197),
        (LLAMA_3B, 3.0, 0.2, 17, 55050),
        (LLAMA_3B, 3.0, 0.4, 35, 110100),
        (LLAMA_3B, 3.0, 0.5, 44, 137625),
    ],
)
def test_check_values_of_the_paper_settings(
    shape: ModelShape, gamma: float, sparsity: float, groups: int, neurons: int
) -> None:
    assert removed_counts(shape, sparsity=sparsity, gamma=gamma) == (groups, neurons)
    plan = make_plan(shape, random_scores(shape), sparsity=sparsity, gamma=gamma, saliency="random")
    assert (plan.budget.removed_groups, plan.budget.removed_neurons) == (groups, neurons)
    assert sum(len(layer.kept_groups) for layer in plan.layers) == plan.budget.of_groups - groups
    before_rounding = sum(len(layer.kept_neurons) for layer in plan.layers)
    assert 0 <= before_rounding - (plan.budget.of_neurons - neurons) < 8 * len(shape.layers)


def test_shares_of_the_8b_model() -> None:
    assert default_gamma(LLAMA_8B) == pytest.approx(4.2)
    assert default_gamma(LLAMA_3B) == pytest.approx(3.0)
    plan = make_plan(LLAMA_8B, random_scores(LLAMA_8B), sparsity=0.5, gamma=3.36, saliency="random")
    removed = 1 - plan.budget.parameters_kept / plan.budget.parameters_dense
    assert removed == pytest.approx(0.435, abs=1e-3)  # of all parameters, where s is of linears


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.4, 0.52])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5])
def test_budget_is_met_exactly_before_rounding(sparsity: float, gamma: float) -> None:
    shape = SMALL
    plan = make_plan(
        shape, random_scores(shape), sparsity=sparsity, gamma=gamma, round_to=1, saliency="random"
    )
    groups, neurons = removed_counts(shape, sparsity=sparsity, gamma=gamma)
    assert sum(4 - len(layer.kept_groups) for layer in plan.layers) == groups
    assert sum(96 - len(layer.kept_neurons) for layer in plan.layers) == neurons
    # counts are rounded down: less than one unit of each kind short of what was asked
    one_unit_each = (shape.group_cost + shape.neuron_cost) * shape.hidden_size / shape.linear_parameters
    assert sparsity - one_unit_each < plan.budget.met_removed_share <= sparsity + 1e-9


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("round_to", [1, 8, 32])
def test_indices_are_sorted_unique_in_range_and_rounded(seed: int, round_to: int) -> None:
    plan = make_plan(SMALL, random_scores(SMALL, seed), sparsity=0.45, round_to=round_to, saliency="random")
    for layer in plan.layers:
        for kept, of in ((layer.kept_groups, layer.of_groups), (layer.kept_neurons, layer.of_neurons)):
            assert list(kept) == sorted(set(kept))
            assert kept and kept[0] >= 0 and kept[-1] < of
        assert len(layer.kept_neurons) % round_to == 0


def test_the_lowest_scores_go_and_every_layer_keeps_its_best() -> None:
    scores = [np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 3.0])]
    kept = kept_units(scores, 3, at_least=1)
    assert [list(mask) for mask in kept] == [[False, False, True], [False, True, True]]


def test_a_count_that_is_whole_on_paper_is_not_one_less() -> None:
    assert 0.29 * 100 < 29 and whole(0.29 * 100) == 29
    assert whole(28.999) == 28


def test_ties_are_cut_by_position_and_never_change_the_count() -> None:
    kept = kept_units([np.zeros(5), np.zeros(5)], 4, at_least=1)
    assert [mask.sum() for mask in kept] == [1, 5]
    for seed in range(10):
        scores = random_scores(SMALL, seed, decimals=1).neurons
        assert sum(mask.sum() for mask in kept_units(scores, 150, at_least=8)) == 4 * 96 - 150


def test_rounding_spares_the_best_of_the_cut() -> None:
    neurons = tuple(np.arange(96.0) + 1000 * layer for layer in range(4))
    scores = UnitScores(groups=random_scores(SMALL).groups, neurons=neurons)
    plan = make_plan(SMALL, scores, sparsity=0.3, gamma=1.0, round_to=32, saliency="x")
    first = plan.layers[0].kept_neurons
    assert len(first) == 32 and first == tuple(range(64, 96))
    cut_in_second = plan.budget.removed_neurons - 64
    assert cut_in_second > 32
    assert plan.layers[1].kept_neurons == tuple(range(96 - 64, 96))


def test_same_scores_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plan = make_plan(SMALL, random_scores(SMALL), sparsity=0.4, saliency="random")
        write_plan(plan, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_plan_survives_the_disk(tmp_path: Path) -> None:
    plan = make_plan(SMALL, random_scores(SMALL), sparsity=0.4, saliency="random", seed=4)
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("sparsity", [-0.1, 0.0, 1.0, 1.7, float("nan")])
def test_infeasible_sparsity_names_the_largest(sparsity: float) -> None:
    largest = largest_sparsity(SMALL, gamma=1.0)
    with pytest.raises(NirvanaError, match=f"{largest:.3f}") as error:
        removed_counts(SMALL, sparsity=sparsity, gamma=1.0)
    assert "--sparsity" in str(error.value)


def test_the_largest_named_sparsity_is_feasible_and_more_is_not() -> None:
    for gamma in (0.3, 1.0, 3.0, 10.0):
        largest = largest_sparsity(SMALL, gamma=gamma, round_to=8)
        make_plan(SMALL, random_scores(SMALL), sparsity=largest, gamma=gamma, saliency="x")
        with pytest.raises(NirvanaError, match="largest"):
            make_plan(SMALL, random_scores(SMALL), sparsity=largest + 0.02, gamma=gamma, saliency="x")


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("inf"), float("nan")])
def test_gamma_must_be_positive(gamma: float) -> None:
    with pytest.raises(NirvanaError, match="gamma must be"):
        removed_counts(SMALL, sparsity=0.2, gamma=gamma)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = make_plan(SMALL, random_scores(SMALL), sparsity=0.4, saliency="random")
    wider = replace(SMALL, layers=(replace(SMALL.layers[0], ffn_width=128), *SMALL.layers[1:]))
    with pytest.raises(NirvanaError, match="layer 0 has 4 KV groups and 96 neurons in the plan, 4 and 128"):
        check_plan_fits(plan, wider)
    with pytest.raises(NirvanaError, match="4 layers and the model 32"):
        pruned_shape(replace(SMALL, layers=SMALL.layers * 8), plan)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: data.update(schema=99), "schema 99"),
        (lambda data: data.pop("layers"), "plan.json: it has no 'layers'"),
        (
            lambda data: data["layers"][1].update(kept_groups=[2, 1]),
            r"layers\[1\]\.kept_groups must be sorted",
        ),
        (lambda data: data["layers"][1].update(kept_groups=[]), r"layers\[1\]\.kept_groups must be sorted"),
        (
            lambda data: data["layers"][2].update(kept_neurons=[0, 96]),
            r"layers\[2\]\.kept_neurons must be sorted",
        ),
        (lambda data: data["layers"][1].update(kept_groups=[True]), r"kept_groups\[0\] is true, not a whole"),
        (lambda data: data["layers"][1].update(kept_groups=[0.0]), r"kept_groups\[0\] is 0\.0, not a whole"),
        (lambda data: data["layers"].append([]), r"layers\[4\] is a list of 0, not an object"),
        (lambda data: data.update(budget=[]), r"budget is a list of 0, not an object"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, change: object, complaint: str) -> None:
    path = tmp_path / "plan.json"
    write_plan(make_plan(SMALL, random_scores(SMALL), sparsity=0.4, saliency="random"), path)
    data = json.loads(path.read_text())
    change(data)  # type: ignore[operator]
    path.write_text(json.dumps(data))
    with pytest.raises(NirvanaError, match=complaint):
        read_plan(path)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.4, 0.5])
@pytest.mark.parametrize("round_to", [1, 8, 32])
def test_uniform_layers_are_alike_and_meet_the_budget(sparsity: float, round_to: int) -> None:
    scores = random_scores(SMALL)
    plan = make_plan(
        SMALL,
        scores,
        sparsity=sparsity,
        gamma=1.0,
        allocation="uniform",
        round_to=round_to,
        saliency="random",
    )
    assert plan.allocation == "uniform"
    assert len(set(pruned_shape(SMALL, plan).layers)) == 1
    assert len(plan.layers[0].kept_neurons) % round_to == 0
    one_step = round_to * SMALL.neuron_cost * SMALL.hidden_size * len(SMALL.layers) / SMALL.linear_parameters
    assert abs(plan.budget.met_removed_share - sparsity) <= one_step / 2 + 1e-9
    for layer, groups, neurons in zip(plan.layers, scores.groups, scores.neurons, strict=True):
        for kept, score in ((layer.kept_groups, groups), (layer.kept_neurons, neurons)):
            assert set(kept) == set(np.argsort(score)[-len(kept) :])  # the best of this very layer


def test_uniform_counts_by_hand() -> None:
    # K=4 groups of 2*8*(2+1) = 48, F=96 neurons of 3: a layer costs 192 + 288 = 480. At 0.4 and gamma 1.5,
    # s_attn = 0.4*480/(192 + 1.5*288) = 0.308: 1.23 groups, so one; 0.4*480 - 48 = 144 is left: 48 neurons.
    plan = make_plan(SMALL, random_scores(SMALL), sparsity=0.4, gamma=1.5, allocation="uniform", saliency="x")
    assert {(len(layer.kept_groups), len(layer.kept_neurons)) for layer in plan.layers} == {(3, 48)}
    assert plan.budget.met_removed_share == pytest.approx(0.4)
    assert (plan.budget.removed_groups, plan.budget.removed_neurons) == (4, 4 * 48)


def test_uniform_takes_more_groups_where_the_ffn_cannot_make_up() -> None:
    largest = largest_sparsity(SMALL, gamma=1.0, round_to=32)
    plan = make_plan(
        SMALL,
        random_scores(SMALL),
        sparsity=largest,
        gamma=1.0,
        allocation="uniform",
        round_to=32,
        saliency="x",
    )
    assert plan.budget.met_removed_share == pytest.approx(largest, abs=16 * 3 / 480)


def test_uniform_of_layers_that_differ_is_refused() -> None:
    wider = replace(SMALL, layers=(replace(SMALL.layers[0], ffn_width=128), *SMALL.layers[1:]))
    with pytest.raises(NirvanaError, match="layers are all alike"):
        make_plan(wider, random_scores(wider), sparsity=0.2, allocation="uniform", saliency="x")


def test_an_unknown_allocation_is_named() -> None:
    with pytest.raises(NirvanaError, match="Did you mean 'uniform'"):
        make_plan(SMALL, random_scores(SMALL), sparsity=0.2, allocation="uniforn", saliency="x")


def test_a_plan_says_what_stays_in_one_line(tiny_llama: Path) -> None:
    plan = plan_for(tiny_llama, sparsity=0.3)
    groups, neurons = (sum(map(len, kept)) for kept in (plan.kept_groups, plan.kept_neurons))
    of_groups = sum(layer.of_groups for layer in plan.layers)
    of_neurons = sum(layer.of_neurons for layer in plan.layers)
    said = f"PrunePlan(sparsity=0.3, {groups} of {of_groups} groups, {neurons} of {of_neurons} neurons)"
    assert repr(plan) == said
