"""The tangent kernel: streamed equals autograd, masked equals sliced, and what a cut removes adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.measure.ntk.kernels import kernels_of, removed_part
from nirvana_deploy.measure.ntk.study import NtkStudy, measure_ntk
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_checkpoint
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import PrunePlan, make_plan
from nirvana_deploy.prune.saliency.gradient import SALIENCIES
from nirvana_deploy.prune.saliency.units import Kept, kept_positions, scored_tensors
from nirvana_deploy.prune.streaming.score import score_units
from nirvana_deploy.report.figures import kernel_figure
from nirvana_deploy.report.pages.ntk import explain, headers, rows


def plan_of(checkpoint: Path, tokens: NDArray[np.int64], saliency: str = "nirvana") -> PrunePlan:
    return make_plan(
        shape_from_config(config_json(checkpoint)),
        score_units(Checkpoint.open(checkpoint), tokens, saliency=saliency),
        sparsity=0.4,
        gamma=1.5,
        round_to=4,
        saliency=saliency,
    )


def by_hand(
    checkpoint: Path, tokens: NDArray[np.int64], functional: str = "nirvana"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: one autograd backward a window through transformers' model; f [n] and gradients [n, P]."""
    model, shape = load_checkpoint(checkpoint), shape_from_config(config_json(checkpoint))
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for layer in range(len(shape.layers)) for name in scored_tensors(shape, layer)]
    f = SALIENCIES[functional].functional
    assert f is not None
    values, rows = [], []
    for window in torch.from_numpy(tokens)[:, None]:
        value = f(model(window).logits, window)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, chosen)]).double())
        values.append(value.detach().double())
    return torch.stack(values), torch.stack(rows)


def assert_near(found: NDArray[np.float64], expected: torch.Tensor) -> None:
    """Within 1e-5 of the kernel's own size."""
    assert np.abs(found - expected.numpy()).max() < 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def windows() -> NDArray[np.int64]:
    return np.random.default_rng(5).integers(3, 272, size=(3, 12))


@pytest.fixture(scope="module")
def study(tiny_llama: Path, windows: NDArray[np.int64]) -> NtkStudy:
    return measure_ntk(
        Checkpoint.open(tiny_llama), plan_of(tiny_llama, windows), windows, random_seeds=(0, 1)
    )


def test_streamed_kernels_equal_autograd_and_masked_equals_sliced(
    tiny: Path, windows: NDArray[np.int64], tmp_path: Path
) -> None:
    plan = plan_of(tiny, windows)
    found = measure_ntk(Checkpoint.open(tiny), plan, windows, random_seeds=())
    values, gradients = by_hand(tiny, windows)
    assert_near(found.whole.kernels.adam, gradients @ gradients.sign().T)
    assert_near(found.whole.kernels.plain, gradients @ gradients.T)
    assert_near(np.diag(found.whole.kernels.adam), gradients.abs().sum(dim=1))
    np.testing.assert_allclose(found.values, values, rtol=1e-5)

    slice_checkpoint(Checkpoint.open(tiny), plan, tmp_path / "sliced")
    values, gradients = by_hand(tmp_path / "sliced", windows)
    [cut] = found.cuts
    assert_near(cut.kernels.adam, gradients @ gradients.sign().T)
    assert_near(cut.kernels.plain, gradients @ gradients.T)
    np.testing.assert_allclose(cut.values, values, rtol=1e-5)


def test_the_functional_is_the_plans_own(tiny_llama: Path, windows: NDArray[np.int64]) -> None:
    taylor = measure_ntk(
        Checkpoint.open(tiny_llama), plan_of(tiny_llama, windows, "taylor"), windows, random_seeds=()
    )
    _, gradients = by_hand(tiny_llama, windows, "taylor")
    assert taylor.functional == "taylor"
    assert_near(taylor.whole.kernels.adam, gradients @ gradients.sign().T)
    magnitude = plan_of(tiny_llama, windows, "magnitude")
    assert (
        measure_ntk(Checkpoint.open(tiny_llama), magnitude, windows[:1], random_seeds=()).functional
        == "nirvana"
    )


def test_what_is_removed_is_the_saliency_of_the_removed_units(
    study: NtkStudy, tiny_llama: Path, windows: NDArray[np.int64]
) -> None:
    plan, checkpoint = plan_of(tiny_llama, windows), Checkpoint.open(tiny_llama)
    alone = [score_units(checkpoint, windows[n : n + 1]) for n in range(len(windows))]
    expected, whole = np.zeros(len(windows)), np.zeros(len(windows))
    for layer, kept in enumerate(plan.layers):
        for window, scores in enumerate(alone):
            for units, stays in ((scores.groups, kept.kept_groups), (scores.neurons, kept.kept_neurons)):
                expected[window] += np.delete(units[layer], stays).sum()
                whole[window] += units[layer].sum()
    np.testing.assert_allclose(study.cuts[0].removed.saliency, expected, rtol=1e-5)
    np.testing.assert_allclose(study.whole.saliency, whole, rtol=1e-5)
    assert (np.abs(study.cuts[0].removed.change) <= study.cuts[0].removed.saliency).all()


def test_the_removed_kernel_keeps_its_bound_and_the_parts_add_up(study: NtkStudy) -> None:
    for cut, record in zip(study.cuts, study.to_json()["cuts"], strict=True):
        adam, removed = record["adam"], cut.removed.kernels.adam
        trainability = np.diag(removed)
        assert (np.abs(removed) <= trainability[:, None] * (1 + 1e-9)).all() and (trainability > 0).all()
        assert adam["removed"] <= adam["removed_bound"]
        for kernel in (adam, record["plain"]):
            assert kernel["drift"] <= kernel["removed"] + kernel["moved"] + 1e-12
        kept = study.whole.kernels - cut.removed.kernels
        moved = np.linalg.norm(kept.adam - cut.kernels.adam) / np.linalg.norm(study.whole.kernels.adam)
        assert adam["moved"] == pytest.approx(moved, rel=1e-9)


def test_random_cuts_have_the_plans_budget(study: NtkStudy) -> None:
    assert [cut.name for cut in study.cuts] == ["pruned", "random 0", "random 1"]
    shares = [cut.removed_share for cut in study.cuts]
    assert shares == pytest.approx([shares[0]] * 3, abs=0.02)
    assert not np.allclose(study.cuts[1].kernels.adam, study.cuts[2].kernels.adam)


def test_the_first_order_meets_the_truth_where_units_contribute_little(
    tiny_llama: Path, windows: NDArray[np.int64], tmp_path: Path
) -> None:
    plan = plan_of(tiny_llama, windows)
    tensors = load_file(tiny_llama / "model.safetensors")
    columns = kept_positions(shape_from_config(config_json(tiny_llama)), plan.kept_groups, plan.kept_neurons)
    for name, kept in columns.items():
        if kept.dimension == 1:  # output columns of removed units, which decide what the units add
            scale = torch.full((tensors[name].shape[1],), 0.01)
            scale[kept.positions] = 1
            tensors[name] *= scale
    small = write_tiny(tmp_path / "small", "llama-tied")
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    found = measure_ntk(Checkpoint.open(small), plan, windows, random_seeds=())
    [cut] = found.cuts
    change = found.values - cut.values
    np.testing.assert_allclose(cut.removed.change, change, atol=0.1 * np.abs(change).max())
    assert (np.abs(change) <= cut.removed.saliency).all()


def test_kernels_by_hand() -> None:
    found = kernels_of([torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.0])])
    assert found.adam.tolist() == [[3, 1], [3, 3]] and found.plain.tolist() == [[5, 3], [3, 9]]
    part = removed_part(
        torch.tensor([[2.0, 5.0], [7.0, 1.0]]),
        [torch.tensor([[1.0, -1.0], [1.0, -3.0]])],
        Kept(1, torch.tensor([0])),
    )
    assert part.kernels.adam.tolist() == [[4]] and part.saliency.tolist() == [8]
    assert part.change.tolist() == [-8]  # column 1 goes: 5 * -1 + 1 * -3
    rows = removed_part(torch.tensor([2.0, 5.0]), [torch.tensor([1.0, -1.0])], Kept(0, torch.tensor([0])))
    assert rows.saliency.tolist() == [5] and rows.change.tolist() == [0]
    whole = removed_part(torch.tensor([2.0, 5.0]), [torch.tensor([1.0, -1.0])], None)
    assert whole.saliency.tolist() == [7] and whole.change.tolist() == [0]


def test_the_record_is_json_and_the_same_twice(study: NtkStudy, tiny_llama: Path) -> None:
    record = study.to_json()
    assert json.loads(json.dumps(record)) == record and record["windows"] == 3
    windows = np.random.default_rng(5).integers(3, 272, size=(3, 12))
    again = measure_ntk(
        Checkpoint.open(tiny_llama), plan_of(tiny_llama, windows), windows, random_seeds=(0, 1)
    )
    assert again.to_json() == record


def test_bad_input_is_named(tiny_llama: Path, windows: NDArray[np.int64], tmp_path: Path) -> None:
    plan = plan_of(tiny_llama, windows)
    with pytest.raises(NirvanaError, match="at least 1, got"):
        measure_ntk(Checkpoint.open(tiny_llama), plan, windows[:0])
    with pytest.raises(NirvanaError, match="'flap' takes no gradient"):
        measure_ntk(Checkpoint.open(tiny_llama), plan, windows, functional="flap")
    other = write_tiny(tmp_path / "other", "qwen3")
    with pytest.raises(NirvanaError, match="does not fit"):
        measure_ntk(Checkpoint.open(other), plan, windows)
    t5 = write_t5(tmp_path / "t5", "t5")
    with pytest.raises(NirvanaError, match="needs a decoder-only model; t5"):
        measure_ntk(Checkpoint.open(t5), plan, windows)
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1e38
    broken = write_tiny(tmp_path / "broken", "llama-tied")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NirvanaError, match="Layer 2"):
        measure_ntk(Checkpoint.open(broken), plan, windows)


def page_record(study: NtkStudy) -> dict[str, Any]:
    return {**study.to_json(), "source": "a text"}


def test_the_words_follow_the_numbers(study: NtkStudy) -> None:
    record = page_record(study)
    says = " ".join(explain(record))
    assert "3 windows of 12 tokens (a text)" in says and "'nirvana'" in says
    pruned, random = record["cuts"][0], record["cuts"][1]
    pruned["adam"] |= {"drift": 0.25, "removed": 0.2, "removed_bound": 0.5}
    random["adam"]["drift"] = record["cuts"][2]["adam"]["drift"] = 7.5
    says = " ".join(explain(record))
    assert "changes by 25.0%" in says and "within that linear bound" in says and "750.0%" in says
    assert "bought no stability" not in says
    pruned["adam"]["drift"] = 9.0
    says = " ".join(explain(record))
    assert "beyond that linear bound" in says and "bought no stability" in says
    assert all(len(row) == len(headers(record)) == 4 for row in rows(record))
    assert "random" not in " ".join(explain({**record, "cuts": [pruned]}))


def test_the_figure_is_well_formed_and_the_same_twice(study: NtkStudy) -> None:
    record = page_record(study)
    svg = kernel_figure(record)
    ElementTree.fromstring(svg)
    assert "pruned (nirvana)" in svg and kernel_figure(record) == svg
    record["cuts"][0]["adam"] |= {"drift": 0.0, "removed": 0.0, "removed_bound": 0.0}
    ElementTree.fromstring(kernel_figure(record))
