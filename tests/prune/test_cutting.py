"""One path from what was measured to what stays: by gamma as ever, by curves, and inside the refit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders.plans import plan_for, shape_of
from builders.tiny import VOCABULARY
from numpy.typing import NDArray

from nirvana_deploy.calibrate.windows import TokenWindows
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.weights import SafetensorsWeights
from nirvana_deploy.pipeline.job import job_of
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.curves.budget import UnitCost
from nirvana_deploy.prune.curves.curve import Curves, curve_of
from nirvana_deploy.prune.curves.facts import facts_of
from nirvana_deploy.prune.cutting import Cutter, reads_curves, width_step
from nirvana_deploy.prune.plan import make_plan
from nirvana_deploy.prune.plan_file import read_plan, write_plan
from nirvana_deploy.prune.recipe import Pruning
from nirvana_deploy.prune.refit.reconstruct import reconstruct_layers
from nirvana_deploy.prune.saliency.units import UnitScores
from nirvana_deploy.prune.streaming.score import score_units

CALIBRATION = {
    "source": "noise",
    "num_sequences": 6,
    "seq_len": 20,
    "text_sha256": "0",
    "seed": 0,
    "draw": 0,
    "more": 1,
}


def cutter(folder: Path, *, cost: UnitCost | None = None, **options: Any) -> Cutter:
    recipe = Pruning(**{"sparsity": 0.3, "round_to": 4, **options})
    return Cutter(Checkpoint.open(folder), recipe, seed=3, model_name="tiny", cost=cost)


def curves_of(folder: Path, tokens: NDArray[np.int64]) -> Curves:
    return Curves(
        groups=tuple(curve_of([0, 1, 2], [0, 0.1 + n, 0.4 + 3 * n]) for n in range(3)),
        neurons=tuple(curve_of([0, 20, 36], [0, 0.05 * (3 - n), 2]) for n in range(3)),
        facts=facts_of(Checkpoint.open(folder), tokens),
    )


def windows_of(tokens: NDArray[np.int64]) -> TokenWindows:
    return TokenWindows(tokens, source="noise", text_sha256="0", seed=0, positions=tuple(range(len(tokens))))


@pytest.fixture
def scores(tiny_llama: Path) -> UnitScores:
    return score_units(Checkpoint.open(tiny_llama), None, saliency="random", seed=1)


@pytest.mark.parametrize(
    ("options", "width", "step"),
    [
        ({}, 1536, 32),
        ({}, 768, 32),
        ({}, 767, 8),  # a block would be more than the least that stays anyway
        ({"preset": "paper"}, 1536, 8),
        ({"preset": "fast"}, 1536, 8),
        ({"allocation": "uniform"}, 1536, 8),
        ({"round_to": 64}, 1536, 64),
        ({"round_to": 8}, 1536, 8),
    ],
)
def test_widths_are_whole_blocks_where_these_cost_next_to_nothing(
    options: dict[str, Any], width: int, step: int
) -> None:
    recipe = job_of("tiny", {"sparsity": 0.3, **options}).pruning
    layers = [SimpleNamespace(ffn_width=width), SimpleNamespace(ffn_width=0)]  # the second has no FFN
    assert width_step(recipe, SimpleNamespace(layers=layers)) == step  # type: ignore[arg-type]


@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_without_curves_the_bytes_are_those_of_the_plan_by_gamma(
    tiny_llama: Path, tmp_path: Path, scores: UnitScores, preset: str, gamma: float
) -> None:
    options = {"sparsity": 0.3, "preset": preset, "round_to": 4}
    recipe = replace(job_of("tiny", options).pruning, reconstruct=False)
    cut = Cutter(Checkpoint.open(tiny_llama), recipe, seed=3, model_name="tiny")
    found = cut.plan(scores, saliency=recipe.saliency, gamma=gamma, calibration=CALIBRATION)
    expected = make_plan(
        shape_of(tiny_llama),
        scores,
        sparsity=0.3,
        gamma=gamma,
        allocation={"paper": "global", "fast": "uniform"}[preset],
        round_to=4,
        saliency={"paper": "nirvana", "fast": "wanda-sp"}[preset],
        seed=3,
        model_name="tiny",
        calibration={key: value for key, value in CALIBRATION.items() if key != "more"},
    )
    write_plan(found, tmp_path / "found")
    write_plan(expected, tmp_path / "expected")
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
    assert not {"curves", "reconstruct"} & set(json.loads((tmp_path / "found").read_text()))


def test_under_curves_the_best_units_by_score_stay(
    tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64], scores: UnitScores
) -> None:
    cut = cutter(tiny_llama, saliency="taylor")
    curves = curves_of(tiny_llama, tokens)
    plan = cut.plan(scores, saliency="taylor", gamma=None, calibration=CALIBRATION, curves=curves)
    allocated = cut.allocated(curves)
    for number, counts in enumerate(allocated.counts):
        for kept, count, score in (
            (plan.kept_groups[number], counts.groups, scores.groups[number]),
            (plan.kept_neurons[number], counts.neurons, scores.neurons[number]),
        ):
            assert len(kept) == count and list(kept) == sorted(set(kept))
            gone = set(range(len(score))) - set(kept)
            assert not gone or max(score[list(gone)]) < min(score[list(kept)])
    assert plan.curves == {"predicted_kl": allocated.predicted_kl, "cost": None}
    assert plan.gamma is None and plan.reconstruct == {"ridge": "auto"} and plan.saliency == "taylor"
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


def test_the_cost_of_a_unit_is_noted_and_counts(
    tiny_llama: Path, tokens: NDArray[np.int64], scores: UnitScores
) -> None:
    curves, cost = curves_of(tiny_llama, tokens), UnitCost(1.0, 4.0, "ms")
    by_time = cutter(tiny_llama, saliency="taylor", cost=cost)
    assert by_time.allocated(curves).counts != cutter(tiny_llama, saliency="taylor").allocated(curves).counts
    plan = by_time.plan(scores, saliency="taylor", gamma=None, calibration=None, curves=curves)
    assert plan.curves is not None
    assert plan.curves["cost"] == {"group": 1.0, "neuron": 4.0, "measure": "ms"}


@pytest.mark.parametrize("ridge", ["auto", 0.5])
def test_a_candidate_with_scores_is_the_refit_of_its_plan(
    tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64], scores: UnitScores, ridge: Any
) -> None:
    windows = windows_of(tokens)
    options: dict[str, Any] = {"saliency": "taylor", "gamma": None, "curves": curves_of(tiny_llama, tokens)}
    cut = cutter(tiny_llama, saliency="taylor", ridge=ridge)
    plan, folder = cut.candidate(windows, scores, out=tmp_path / "r", **options)
    assert folder == tmp_path / "r"
    fixed = None if ridge == "auto" else ridge
    reconstruct_layers(Checkpoint.open(tiny_llama), plan, tokens, tmp_path / "again", ridge=fixed)
    for one in sorted(path.name for path in folder.iterdir()):
        assert (folder / one).read_bytes() == (tmp_path / "again" / one).read_bytes()
    plain = cutter(tiny_llama, saliency="taylor", reconstruct=False)
    cut_alone, nothing = plain.candidate(windows, scores, out=tmp_path / "none", **options)
    assert nothing is None and not (tmp_path / "none").exists()
    assert cut_alone.layers == plan.layers and cut_alone.reconstruct is None


def test_a_candidate_without_scores_is_chosen_inside_the_refit(
    tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    cut, curves = cutter(tiny_llama), curves_of(tiny_llama, tokens)
    plan, folder = cut.candidate(
        windows_of(tokens), None, saliency="refit", gamma=None, curves=curves, out=tmp_path / "r"
    )
    kept = [(len(one.kept_groups), len(one.kept_neurons)) for one in plan.layers]
    assert kept == [(one.groups, one.neurons) for one in cut.allocated(curves).counts]
    assert plan.saliency == "refit" and plan.calibration is not None
    dense = Checkpoint.open(tiny_llama)
    slice_checkpoint(dense, plan, tmp_path / "pruned", reconstruction=folder)
    name = "model.layers.1.mlp.down_proj.weight"
    width = len(plan.kept_neurons[1])
    assert SafetensorsWeights(tmp_path / "pruned").load(name).shape == (48, width)


def test_curves_reach_the_floor_of_the_narrowest_layer(tiny_llama: Path, tmp_path: Path) -> None:
    """In a model that was cut before: else what lies behind the end of its curve would look free."""
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, size=(6, 20))
    slice_checkpoint(Checkpoint.open(tiny_llama), plan_for(tiny_llama), tmp_path / "pruned")
    again = cutter(tmp_path / "pruned", min_neurons=14, sparsity=0.1)
    widths = [layer.ffn_width for layer in again.dense.shape.layers]
    assert len(set(widths)) > 1
    found = again.curves(tokens)
    for width, curve in zip(widths, found.neurons, strict=True):
        assert width - curve.removed[-1] == min(width, 16, min(widths))
    assert again.allocated(found).predicted_kl > 0


def test_when_curves_are_read() -> None:
    assert reads_curves(Pruning(sparsity=0.1), "nirvana")
    assert reads_curves(Pruning(sparsity=0.1, allocation="uniform"), "refit")
    assert not reads_curves(Pruning(sparsity=0.1, allocation="uniform"), "nirvana")
