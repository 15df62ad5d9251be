"""Block after block: every family comes nearer to the dense model, and kills change nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.recovering import SEQ_LEN, Cut, kl_of
from safetensors.torch import load_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.quantize.weights.rounding import round_weight
from nirvana_deploy.recover import layers
from nirvana_deploy.recover.recipe import Recovery

LAYERS = {"recover_method": "layers", "learning_rate": 2e-3}


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3", "gemma3", "phi3", "olmo2", "flan-t5", "t5"])
def test_each_family_comes_nearer_and_is_written_as_it_was_trained(
    kind: str, tmp_path: Path, text: Path
) -> None:
    cut = Cut(tmp_path, kind, text)
    done = cut.recover(**LAYERS)
    before, after = done.course.curve
    assert before.kl == pytest.approx(kl_of(cut.cut, cut.dense, done.text.watch), rel=1e-4)
    assert done.course.kept_step == 12 and after.kl < 0.97 * before.kl
    slice_checkpoint(cut.dense, cut.plan, tmp_path / "after", recovery=tmp_path / "recovery")
    kl = kl_of(Checkpoint.open(tmp_path / "after"), cut.dense, done.text.watch)
    assert kl == pytest.approx(after.kl, rel=1e-4)


def test_a_killed_training_goes_on_behind_the_last_block(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = Cut(tmp_path, "llama-tied", text)
    llama.recover("undisturbed", **LAYERS)
    train, trained = layers._train, 0

    def killed(*arguments: Any) -> None:
        nonlocal trained
        if trained == 1:
            raise KeyboardInterrupt
        trained += 1
        train(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "_train", killed)
        with pytest.raises(KeyboardInterrupt):
            llama.recover("resumed", **LAYERS)
    assert len(list((tmp_path / "state").glob("layer-*.safetensors"))) == 1
    llama.recover("resumed", **LAYERS)
    second = load_file(tmp_path / "resumed/model.safetensors")
    for name, tensor in load_file(tmp_path / "undisturbed/model.safetensors").items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)
    assert not (tmp_path / "state").exists()


def test_what_does_not_help_is_undone(tmp_path: Path, text: Path) -> None:
    llama = Cut(tmp_path, "llama-tied", text)
    done = llama.recover(recover_method="layers", learning_rate=0.5)
    assert done.course.kept_step == 0
    before = load_file(tmp_path / "cut/model.safetensors")
    for name, tensor in load_file(tmp_path / "recovery/model.safetensors").items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_block_whose_loss_is_no_number_stays_as_it_was(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = Cut(tmp_path, "llama-tied", text)
    with pytest.raises(NirvanaError, match=r"loss is (nan|inf) at step \d+.*better than the cut"):
        llama.recover(**{**LAYERS, "learning_rate": 1e30})
    prepare = layers._prepare

    def spoil_the_second(block: torch.nn.Module, recipe: Recovery) -> None:
        prepare(block, recipe)
        if len(list((tmp_path / "state").glob("layer-*"))) == 1:
            next(block.parameters()).register_hook(lambda gradient: gradient * torch.nan)

    shutil.rmtree(tmp_path / "state", ignore_errors=True)
    monkeypatch.setattr(layers, "_prepare", spoil_the_second)
    done = llama.recover(**LAYERS)
    assert done.course.kept_step == 12
    assert "loss is nan at step 2" in done.course.stopped and "--learning-rate 0.0005" in done.course.stopped
    written, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("recovery", "cut"))
    same = {name for name, one in written.items() if torch.equal(one, cut[name])}
    assert same == {name for name in written if ".layers.1." in name}


def test_blocks_are_rounded_while_they_are_trained(tmp_path: Path, text: Path) -> None:
    llama = Cut(tmp_path, "llama-tied", text)
    assert llama.recover(**LAYERS, recover_for="w4").course.kept_step
    written = load_file(tmp_path / "recovery/model.safetensors")
    for weight in (one.float() for one in written.values() if one.ndim == 2 and min(one.shape) >= 16):
        again = torch.from_numpy(round_weight(weight.T.numpy(), bits=4, block_size=32).dequantized().T)
        torch.testing.assert_close(again, weight, rtol=0, atol=4e-3 * float(weight.abs().max()))


def test_a_budget_in_time_takes_the_first_block_as_an_example(tmp_path: Path, text: Path) -> None:
    llama = Cut(tmp_path, "llama-tied", text)
    way = layers.BlockByBlock(llama.cut, llama.dense, Recovery(recover_batch=2), tmp_path / "state")
    assert 0 < way.seconds_of_step(SEQ_LEN) < 60


def test_states_that_do_not_fit_are_refused_before_the_work(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nirvana_deploy.base.resources.free_memory_bytes", lambda: 0)
    with pytest.raises(NirvanaError, match=r"states of 1,\d\d\d tokens, needs.*\n.*--recover 50k"):
        Cut(tmp_path, "llama-tied", text).recover(**LAYERS)
