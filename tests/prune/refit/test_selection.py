"""Selection inside the refit: as many stay as asked, and the refit is that of the units it chose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.plans import logits_of, plan_for, shape_of
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.weights import SafetensorsWeights
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.curves.budget import Counts
from nirvana_deploy.prune.plan import Origin, PrunePlan, plan_of
from nirvana_deploy.prune.refit.elimination import RIDGE, group_inputs, scales
from nirvana_deploy.prune.refit.least_squares import NormalEquations
from nirvana_deploy.prune.refit.readers import Reader
from nirvana_deploy.prune.refit.reconstruct import reconstruct_layers, refit_readers
from nirvana_deploy.prune.refit.selection import Selected, select_and_refit

WRITERS: dict[str, Callable[[Path], Path]] = {
    "llama": partial(write_tiny, kind="llama-tied"),
    "qwen2": partial(write_tiny, kind="qwen2"),
    "t5": partial(write_t5, kind="t5"),
}


@pytest.fixture(params=list(WRITERS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path / "dense")


def counts_for(folder: Path) -> list[Counts]:
    """Other counts in every layer."""
    return [
        Counts(max(1, layer.kv_heads - 1 - number % 2), min(layer.ffn_width, 12 + 4 * number))
        for number, layer in enumerate(shape_of(folder).layers)
    ]


def plan_from(folder: Path, selected: Selected) -> PrunePlan:
    return plan_of(
        shape_of(folder),
        selected.groups,
        selected.neurons,
        origin=Origin("tiny", 0.4, 0, None),
        saliency="refit",
        allocation="curves",
        round_to=4,
    )


def test_where_everything_stays_nothing_changes(
    folder: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    shape = shape_of(folder)
    counts = [Counts(layer.kv_heads, layer.ffn_width) for layer in shape.layers]
    selected = select_and_refit(Checkpoint.open(folder), counts, tokens, tmp_path / "r")
    assert selected.groups == tuple(tuple(range(layer.kv_heads)) for layer in shape.layers)
    assert selected.neurons == tuple(tuple(range(layer.ffn_width)) for layer in shape.layers)
    dense, refitted = SafetensorsWeights(folder), SafetensorsWeights(tmp_path / "r")
    assert refitted.names()
    for name in refitted.names():
        torch.testing.assert_close(refitted.load(name), dense.load(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.3, 1.0])
def test_the_refit_is_that_of_the_units_it_chose(
    folder: Path, tmp_path: Path, tokens: NDArray[np.int64], ridge: float
) -> None:
    counts = counts_for(folder)
    selected = select_and_refit(Checkpoint.open(folder), counts, tokens, tmp_path / "r", ridge=ridge)
    kept = [Counts(len(g), len(n)) for g, n in zip(selected.groups, selected.neurons, strict=True)]
    assert kept == counts
    for units in (*selected.groups, *selected.neurons):
        assert list(units) == sorted(set(units))
    plan = plan_from(folder, selected)
    given = reconstruct_layers(Checkpoint.open(folder), plan, tokens, tmp_path / "given", ridge=ridge)
    one, other = SafetensorsWeights(tmp_path / "r"), SafetensorsWeights(tmp_path / "given")
    assert one.names() == other.names() == sorted(given.explained_share)
    for name in one.names():
        torch.testing.assert_close(one.load(name), other.load(name), rtol=1e-4, atol=1e-5)
    shares = selected.reconstruction.explained_share
    assert shares == pytest.approx(given.explained_share, rel=1e-4, abs=1e-5)
    slice_checkpoint(Checkpoint.open(folder), plan, tmp_path / "pruned", reconstruction=tmp_path / "r")
    pruned = SafetensorsWeights(tmp_path / "pruned")
    for name in one.names():
        assert torch.equal(pruned.load(name), one.load(name))


def least_objective(equations: NormalEquations, kept: list[int]) -> float:
    """Least of ``|Y - X W^T|^2 + ridge |z - z_0|^2`` with ``kept`` alone, but for what all choices share."""
    gram, weight = equations.gram.double(), equations.weight.double()
    scale = scales(gram.diagonal())
    start, system = weight * scale, gram / scale / scale[:, None] + RIDGE * torch.eye(len(scale))
    reads = (equations.cross.double() + weight @ gram) / scale + RIDGE * start
    return -float((torch.linalg.solve(system[kept][:, kept], reads[:, kept].T) * reads[:, kept].T).sum())


def test_every_choice_is_the_best_toward_the_dense_states(
    tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    checkpoint, counts = Checkpoint.open(tiny_llama), [Counts(2, 20)] * 3
    selected = select_and_refit(checkpoint, counts, tokens, tmp_path / "r", ridge=0.3)

    def check(reader: Reader, equations: NormalEquations) -> torch.Tensor:
        if reader.groups is not None:
            pairs = [group_inputs(pair, 3, 48).tolist() for pair in ((0, 1), (0, 2), (1, 2))]
            best = min(pairs, key=lambda kept: least_objective(equations, kept))
            assert group_inputs(selected.groups[reader.position], 3, 48).tolist() == best
        else:
            best = list(range(40))
            while len(best) > 20:
                fewer = [[one for one in best if one != gone] for gone in best]
                best = min(fewer, key=lambda kept: least_objective(equations, kept))
            assert list(selected.neurons[reader.position]) == best
        return torch.tensor(best)

    refit_readers(checkpoint, tokens, tmp_path / "again", chosen=check, ridge=0.3)


def test_what_is_chosen_beats_what_is_drawn(
    tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    drawn = plan_for(tiny_llama)
    counts = [Counts(len(g), len(n)) for g, n in zip(drawn.kept_groups, drawn.kept_neurons, strict=True)]
    checkpoint = Checkpoint.open(tiny_llama)
    selected = select_and_refit(checkpoint, counts, tokens, tmp_path / "chosen", ridge=1.0)
    reconstruct_layers(checkpoint, drawn, tokens, tmp_path / "drawn", ridge=1.0)
    slice_checkpoint(
        checkpoint, plan_from(tiny_llama, selected), tmp_path / "a", reconstruction=tmp_path / "chosen"
    )
    slice_checkpoint(checkpoint, drawn, tmp_path / "b", reconstruction=tmp_path / "drawn")
    dense = logits_of(tiny_llama, tokens)
    near, far = ((logits_of(tmp_path / name, tokens) - dense).norm() for name in "ab")
    assert near < far


def test_copies_go_before_what_is_needed(tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    """Half of the first FFN are copies of the other half: one of each pair goes, and nothing is lost."""
    folder = write_tiny(tmp_path / "dense", "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        weight = tensors[f"model.layers.0.mlp.{name}.weight"]
        weight[20:] = weight[:20]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    counts = [Counts(3, 20), Counts(3, 40), Counts(3, 40)]
    selected = select_and_refit(Checkpoint.open(folder), counts, tokens, tmp_path / "r", ridge=1e-6)
    assert sorted(unit % 20 for unit in selected.neurons[0]) == list(range(20))
    plan = plan_from(folder, selected)
    slice_checkpoint(Checkpoint.open(folder), plan, tmp_path / "pruned", reconstruction=tmp_path / "r")
    found, dense = (logits_of(one, tokens) for one in (tmp_path / "pruned", folder))
    torch.testing.assert_close(found, dense, rtol=2e-3, atol=2e-3)


def test_activations_that_overflow_are_named(tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    folder = write_tiny(tmp_path / "loud", "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NirvanaError, match=r"layers\.1\.mlp\.down_proj\.weight: its inputs are NaN"):
        select_and_refit(Checkpoint.open(folder), [Counts(2, 16)] * 3, tokens, tmp_path / "r")
    assert list(tmp_path.iterdir()) == [folder]
