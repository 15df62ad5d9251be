"""Curves of tiny models: from 0 to the floors, the same every time, and equal to one full backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.plans import shape_of
from builders.tiny import VOCABULARY, write_tiny
from builders.tiny_t5 import write_t5
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.curves.curve import Curves, write_curves
from nirvana_deploy.prune.curves.facts import facts_of
from nirvana_deploy.prune.curves.measure_curves import measure_curves, tried_groups
from nirvana_deploy.prune.curves.metric import Metric
from nirvana_deploy.prune.refit.elimination import eliminate, eliminate_groups, optimum_of
from nirvana_deploy.prune.refit.readers import Wanted, readers_of

WRITERS: dict[str, Callable[[Path], Path]] = {
    "llama": partial(write_tiny, kind="llama-tied"),
    "t5": partial(write_t5, kind="t5"),
}


@pytest.fixture(scope="module", params=list(WRITERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def windows() -> NDArray[np.int64]:
    """[30, 20]: 12 of them measure the scale."""
    return np.random.default_rng(0).integers(3, VOCABULARY, size=(30, 20))


@pytest.fixture(scope="module")
def curves(folder: Path, windows: NDArray[np.int64]) -> Curves:
    return measure_curves(Checkpoint.open(folder), windows)


def test_curves_ascend_from_zero_to_the_floors(
    folder: Path, curves: Curves, windows: NDArray[np.int64]
) -> None:
    shape = shape_of(folder)
    for layer, groups, neurons in zip(shape.layers, curves.groups, curves.neurons, strict=True):
        assert groups.removed.tolist() == list(range(layer.kv_heads))
        assert neurons.removed[0] == 0
        assert neurons.removed[-1] == max(layer.ffn_width - max(1, layer.ffn_width // 24), 0)
        for curve in (groups, neurons):
            assert len(curve.removed) == len(curve.kl) and curve.kl[0] == 0
            assert (np.diff(curve.removed) > 0).all() and (np.diff(curve.kl) >= 0).all()
        assert groups.kl[-1] > 1e-4 and (not layer.ffn_width or neurons.kl[-1] > 1e-4)
    assert curves.facts == facts_of(Checkpoint.open(folder), windows)


def test_what_is_predicted_is_that_of_one_full_backward(
    tiny_llama: Path, windows: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole model in float64, one backward from likelihoods of labels drawn with the same numbers."""
    monkeypatch.setattr(f"{measure_curves.__module__}.measure", lambda *_, **__: None)
    monkeypatch.setattr(f"{measure_curves.__module__}.scaled_by", lambda _, curves, *__, **___: curves)
    found = measure_curves(Checkpoint.open(tiny_llama), windows, seed=5)
    fitted = torch.from_numpy(windows[:15])  # the other half measures the scale
    shape, model = shape_of(tiny_llama), Checkpoint.open(tiny_llama).load(dtype=torch.float64)
    readers = [one for p, block in enumerate(model.model.layers) for one in readers_of(shape, [p], block)]
    met: dict[str, dict[str, torch.Tensor]] = {reader.name: {} for reader in readers}
    for reader in readers:
        seen = met[reader.name]
        reader.entry.register_forward_pre_hook(lambda _, x, seen=seen: seen.update(entered=x[0]))
        reader.linear.register_forward_hook(lambda _, x, y, seen=seen: seen.update(inputs=x[0], output=y))
    likelihood = model(fitted).logits.log_softmax(-1)
    draws = torch.rand(windows.shape, generator=torch.Generator().manual_seed(5))[:15].double() * (1 - 1e-4)
    labels = (likelihood.exp().cumsum(-1) < draws[..., None]).sum(-1, keepdim=True)
    drawn = likelihood.gather(-1, labels).sum()
    gradients = torch.autograd.grad(drawn, [met[reader.name]["output"] for reader in readers])
    for reader, gradient in zip(readers, gradients, strict=True):
        seen = {name: value.detach() for name, value in met[reader.name].items()}
        weight = Wanted(reader.behind(seen["entered"], seen["output"])).importance()
        metric, inputs = Metric(shape.hidden_size), (seen["inputs"] * weight).flatten(0, 1)
        metric.observe(gradient, weight)
        columns = reader.linear.weight.detach()
        optimum = optimum_of(inputs.T @ inputs, columns, metric=metric.root())
        assert optimum is not None
        if reader.groups is None:
            curve, width = found.neurons[reader.position], columns.shape[1]
            expected = eliminate(optimum, keep=max(1, width // 24), block=1).cost
        else:
            curve = found.groups[reader.position]
            expected = eliminate_groups(optimum, reader.groups)[1]
        np.testing.assert_allclose(curve.kl, np.array(expected) / (2 * fitted.numel()), rtol=2e-3, atol=1e-9)


def test_curves_end_where_so_many_neurons_stay(folder: Path, windows: NDArray[np.int64]) -> None:
    found = measure_curves(Checkpoint.open(folder), windows[:6], least_neurons=16)
    for layer, curve in zip(shape_of(folder).layers, found.neurons, strict=True):
        assert curve.removed[-1] == max(layer.ffn_width - 16, 0)


def test_the_same_seed_gives_the_same_bytes_in_memory_or_spilled(
    folder: Path, curves: Curves, windows: NDArray[np.int64], tmp_path: Path
) -> None:
    spilled = measure_curves(Checkpoint.open(folder), windows, spill=True, spill_folder=tmp_path)
    other = measure_curves(Checkpoint.open(folder), windows, seed=1)
    assert not list(tmp_path.iterdir())
    for name, one in (("first", curves), ("spilled", spilled), ("other", other)):
        write_curves(one, tmp_path / name)
    first = (tmp_path / "first").read_bytes()
    assert (tmp_path / "spilled").read_bytes() == first
    assert (tmp_path / "other").read_bytes() != first


def test_idle_units_are_free_and_layers_tell_apart(tmp_path: Path, windows: NDArray[np.int64]) -> None:
    folder = write_tiny(tmp_path / "model", "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][:, 15:] = 0
    tensors["model.layers.1.self_attn.o_proj.weight"][:, :32] = 0  # two of three groups
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = measure_curves(Checkpoint.open(folder), windows)
    assert found.neurons[1].at(25) < 1e-6 < 1e-3 < found.neurons[0].at(25)
    assert found.groups[1].at(2) < 1e-6 < 1e-3 < found.groups[0].at(2)


@pytest.mark.parametrize("count", [2, 3])
def test_two_windows_are_enough_and_one_is_refused(
    tiny_llama: Path, windows: NDArray[np.int64], count: int
) -> None:
    found = measure_curves(Checkpoint.open(tiny_llama), windows[:count])
    assert all(np.isfinite(curve.kl).all() for curve in found.groups + found.neurons)
    with pytest.raises(NirvanaError, match="Curves need at least 2 calibration windows") as refused:
        measure_curves(Checkpoint.open(tiny_llama), windows[:1])
    assert refused.value.hint == "Pass --num-sequences 64."


def test_activations_that_overflow_name_the_linear(tmp_path: Path, windows: NDArray[np.int64]) -> None:
    folder = write_tiny(tmp_path / "model", "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NirvanaError, match=r"layers\.2\..*weight: its inputs or the gradients .* NaN"):
        measure_curves(Checkpoint.open(folder), windows[:4])


@pytest.mark.parametrize(("groups", "tried"), [(1, []), (2, [1]), (3, [1, 2]), (8, [3, 5]), (32, [11, 21])])
def test_an_attention_is_tried_at_two_counts_at_most(groups: int, tried: list[int]) -> None:
    assert tried_groups(groups) == tried
