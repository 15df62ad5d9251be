"""Cut a little, recover a little: units go for good, a kill changes nothing, what makes no sense is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.recovering import Cut
from builders.tiny import write_tiny
from safetensors.torch import load_file, save_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.layout import RECOVERY
from nirvana_deploy.output.promise import unlisted
from nirvana_deploy.output.run import Run
from nirvana_deploy.pipeline.folder import recover_folder
from nirvana_deploy.pipeline.prune_export import prune_export
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.divergence import masked_quality
from nirvana_deploy.prune.plan import PrunePlan
from nirvana_deploy.prune.plan_file import read_plan
from nirvana_deploy.prune.refit.elimination import eliminate, eliminate_groups, optimum_of
from nirvana_deploy.prune.slicing import in_dense_shape
from nirvana_deploy.prune.streaming.model import StreamedModel
from nirvana_deploy.recover import recovery, training
from nirvana_deploy.recover.budget import part_of
from nirvana_deploy.recover.learning.compared import streamed_quality


@pytest.mark.parametrize("kind", ["llama-biased", "phi3", "t5"])
def test_in_the_dense_shape_it_computes_the_same_and_is_cut_the_same(
    tmp_path: Path, text: Path, kind: str
) -> None:
    cut = Cut(tmp_path, kind, text)
    trained = Checkpoint.open(shutil.copytree(tmp_path / "cut", tmp_path / "trained"))
    file = tmp_path / "trained/model.safetensors"
    random = torch.Generator().manual_seed(1)
    changed = {
        name: one + 0.02 * torch.randn(one.shape, generator=random) if "embed" not in name else one
        for name, one in load_file(file).items()
    }
    save_file(changed, file, metadata={"format": "pt"})
    trained = Checkpoint.open(tmp_path / "trained")
    again = in_dense_shape(cut.dense, cut.plan, trained)
    windows = torch.from_numpy(cut.windows[:2])
    wanted, found = (StreamedModel(one).logits(windows) for one in (trained, again))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    slice_checkpoint(again, cut.plan, tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again/model.safetensors").items():
        torch.testing.assert_close(tensor, changed[name], rtol=0, atol=0)


def test_dead_units_go_first() -> None:
    random = torch.Generator().manual_seed(5)
    inputs, weight = torch.randn(200, 32, generator=random), torch.randn(16, 32, generator=random)
    dead = [0, 5, 6, 7, 20, 31]
    inputs[:, dead], weight[:, dead] = 0.0, 0.0
    weight[:, 9] *= 1e-3  # nearly dead
    gram, missing = inputs.T @ inputs, 0.1 * torch.randn(16, 32, generator=random) @ inputs.T @ inputs
    for keep in (26, 25, 12):
        optimum = optimum_of(gram, weight, missing=missing)
        assert optimum is not None
        assert not set(eliminate(optimum, keep=keep, block=1).kept.tolist()) & set(dead)
    inputs[:, 8:16], weight[:, 8:16] = 0.0, 0.0
    optimum = optimum_of(inputs.T @ inputs, weight)
    assert optimum is not None
    kept, cost = eliminate_groups(optimum, 4)
    assert kept[1] == (0, 2, 3) and cost[1] == pytest.approx(0, abs=1e-9)


def test_quality_of_a_cut_is_that_of_its_plan(tmp_path: Path, text: Path) -> None:
    cut = Cut(tmp_path, "flan-t5", text)
    [wanted] = masked_quality(cut.dense, [cut.plan], [cut.windows])
    kl, loss = streamed_quality(cut.cut, cut.dense, cut.windows, progress=SILENT)
    assert kl == pytest.approx(wanted.divergence.mean(), rel=1e-4)
    assert loss == pytest.approx(wanted.loss.mean(), rel=1e-5)


def test_a_budget_is_shared() -> None:
    assert [part_of(written, 3) for written in ("30m", "1k", "2")] == ["600.000s", "333", "1"]
    assert part_of("30m", 1) == "30m"


def options_for(text: Path) -> dict[str, Any]:
    return {
        "sparsity": 0.4,
        "calib": str(text),
        "recover_text": str(text),
        "num_sequences": 8,
        "seq_len": 16,
        "round_to": 4,
        "heldout_sequences": 3,
        "heldout_len": 16,
        "recover": "400",
        "recover_batch": 2,
        "learning_rate": 2e-3,
    }


def stages_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text())["stages"]
    return found


def kept(plan: PrunePlan) -> list[set[int]]:
    return [set(one) for one in (*plan.kept_groups, *plan.kept_neurons)]


def killed_in_the_last_step(model: str, out: Path, asked: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    told, count = training._Told.on_step_end, 0

    def kill(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        told(self, *args, **kwargs)

    patch.setattr(training._Told, "on_step_end", kill)
    with pytest.raises(KeyboardInterrupt):
        prune_export(model, out=out, **asked)


@pytest.mark.integration
def test_two_steps_reach_the_target_also_where_a_kill_comes_between(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = str(write_tiny(tmp_path / "llama", "llama-tied")), tmp_path / "out"
    asked = {**options_for(text), "recover_steps": 2, "until": "checkpoint"}
    seeds, draw = [], recovery.training_text

    def drawn(*args: Any, **kwargs: Any) -> Any:
        seeds.append(kwargs["seed"])
        return draw(*args, **kwargs)

    monkeypatch.setattr(recovery, "training_text", drawn)
    with monkeypatch.context() as patch:
        killed_in_the_last_step(model, out, asked, patch)
    assert list(stages_of(out))[-2:] == ["checkpoint-1", "reconstruct"]
    assert not (out / RECOVERY).exists()
    prune_export(model, out=out, **asked, resume=True)
    assert seeds == [1, 2, 2]  # each step has text of its own
    plans = [read_plan(out / part / "plan.json") for part in ("step-1", "")]
    assert [plan.sparsity for plan in plans] == pytest.approx([0.2, 0.4])
    assert all(a >= b for a, b in zip(*map(kept, plans), strict=True)) and kept(plans[0]) != kept(plans[1])
    done, last = stages_of(out), ["reconstruct", "recover", "checkpoint"]
    assert list(done)[-6:] == [*(f"{name}-1" for name in last), *last]
    assert [done[name]["result"]["steps"] for name in ("recover-1", "recover")] == [6, 6]
    assert done["recover"]["result"]["answers_of_cut"] and not done["recover-1"]["result"]["answers_of_cut"]
    assert not (out / ".nirvana-deploy.recovery").exists()
    with Run.open(out) as run:
        assert unlisted(run) == []


@pytest.mark.slow
def test_a_kill_changes_nothing_and_one_step_takes_the_place_of_two(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(write_tiny(tmp_path / "llama", "llama-tied"))
    asked = {**options_for(text), "recover_steps": 2, "until": "checkpoint"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prune_export(model, out=whole, **asked)
    with monkeypatch.context() as patch:
        killed_in_the_last_step(model, killed, asked, patch)
    prune_export(model, out=killed, **asked, resume=True)
    for name in ("plan.json", "step-1/plan.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    weights = load_file(killed / "checkpoint/model.safetensors")
    for name, tensor in load_file(whole / "checkpoint/model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-7)

    before, plan = stages_of(whole), read_plan(whole / "plan.json")
    prune_export(model, out=whole, **asked, resume=True)
    assert stages_of(whole) == before
    recover_folder(whole, recover="100", recover_steps=1)
    assert not list(whole.glob("step-*")) and "recover-1" not in stages_of(whole)
    assert kept(read_plan(whole / "plan.json")) != kept(plan)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recover": None}, r"--steps 2 trains after each cut.*missing.\n.*--recover 30m"),
        ({"saliency": "taylor"}, r"saliency taylor ranks those of the dense model.*\nLeave --saliency out"),
        ({"preset": "paper"}, r"saliency nirvana ranks.*\nLeave --preset paper out"),
        ({"recover": "60"}, "--recover: 30 tokens are less than one step, which reads 32"),
    ],
)
def test_steps_that_make_no_sense_are_refused(
    tmp_path: Path, text: Path, tiny_llama: Path, options: dict[str, Any], said: str
) -> None:
    asked = {**options_for(text), "recover_steps": 2, **options}
    with pytest.raises(NirvanaError, match=said):
        prune_export(str(tiny_llama), out=tmp_path / "out", until="checkpoint", **asked)
    assert not (tmp_path / "out").exists()
