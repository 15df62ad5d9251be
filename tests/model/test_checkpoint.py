"""A checkpoint is opened once: config and tensors agree, and everything else is read from it on demand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.plans import plan_for
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint, load_checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint


def test_an_open_checkpoint_is_what_transformers_builds(tiny: Path, tokens: NDArray[np.int64]) -> None:
    checkpoint, theirs = Checkpoint.open(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    named = dict(theirs.named_parameters())
    assert set(checkpoint.weights.names()) == set(named)
    for name, parameter in named.items():
        assert torch.equal(checkpoint.weights.load(name), parameter)
    assert type(checkpoint.pretrained_config) is type(theirs.config)
    assert checkpoint.shape.hidden_size == theirs.config.hidden_size
    with torch.inference_mode():
        batch = torch.from_numpy(tokens)
        for ours in (checkpoint.load(), load_checkpoint(str(tiny))):
            assert torch.equal(ours(batch).logits, theirs(batch).logits)
    assert checkpoint.load(dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_pruned_checkpoint_opens_with_the_classes_of_this_package(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama)
    slice_checkpoint(Checkpoint.open(tiny_llama), plan, tmp_path / "pruned")
    checkpoint = Checkpoint.open(tmp_path / "pruned")
    assert [layer.kv_heads for layer in checkpoint.shape.layers] == [len(kept) for kept in plan.kept_groups]
    assert type(checkpoint.pretrained_config).__name__ == "NirvanaLlamaConfig"
    assert type(checkpoint.load()).__name__ == "NirvanaLlamaForCausalLM"
    assert {parameter.device.type for parameter in checkpoint.meta_model().parameters()} == {"meta"}


def test_models_made_of_a_checkpoint_leave_its_config_alone(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_t5(tmp_path, "flan-t5"))
    parsed, theirs = copy.deepcopy(checkpoint.config), checkpoint.pretrained_config.to_dict()
    assert not checkpoint.load().training
    checkpoint.meta_model()
    assert checkpoint.config == parsed == json.loads((tmp_path / "config.json").read_text())
    assert checkpoint.pretrained_config.to_dict() == theirs


def test_opening_reads_no_tensor(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny_llama)

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("nirvana_deploy.model.weights.SafetensorsWeights._mapped", refuse)
    assert Checkpoint.open(tiny_llama).shape == checkpoint.shape


def test_the_tokenizer_and_stop_tokens_are_the_folders(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    assert checkpoint.tokenizer is checkpoint.tokenizer
    assert checkpoint.stop_token_ids == {checkpoint.tokenizer.eos_token_id} == {2}
    folder = write_tiny(tmp_path / "silent", "mistral")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(NirvanaError, match="has no tokenizer"):
        _ = Checkpoint.open(folder).tokenizer


def test_a_length_beyond_the_positions_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    Checkpoint.open(tiny_llama).require_length(512)
    with pytest.raises(NirvanaError, match=r"seq_len 513 is longer than the model's 512 positions\."):
        Checkpoint.open(tiny_llama).require_length(513)
    Checkpoint.open(write_t5(tmp_path, "t5")).require_length(10**6)  # relative positions have no end


def test_what_is_no_checkpoint_or_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"is not a checkpoint: it has no config\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(NirvanaError, match="Unsupported architecture: model_type 'gpt2'"):
        Checkpoint.open(tmp_path)
    folder = write_tiny(tmp_path / "model", "qwen2")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NirvanaError, match=r"'model\.norm\.weight' has shape \[5\]"):
        Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(NirvanaError, match=r"has no \*\.safetensors"):
        Checkpoint.open(folder)
