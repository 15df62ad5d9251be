"""config.json and stored tensors mean what transformers takes them for, or the model is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.odd import CLOSE, IDS, edit, edit_weights, far, onnx_logits, torch_logits
from builders.plans import plan_for
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from transformers import AutoModelForSeq2SeqLM

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.runtime.onnxruntime.encoder_decoder import OrtSeq2Seq


def own_head(tensors: dict[str, torch.Tensor]) -> None:
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = 0.2 * torch.randn(embedding.shape, generator=torch.manual_seed(3))


def same_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


LEFT_OUT: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("llama-tied", {}, ("rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "head_dim")),
    ("mistral", {}, ("max_position_embeddings", "rope_parameters", "tie_word_embeddings")),
    ("qwen2", {}, ("use_sliding_window", "layer_types", "sliding_window", "max_window_layers")),
    ("qwen3", {"head_dim": 128}, ("head_dim", "attention_bias", "tie_word_embeddings")),
]


@pytest.mark.parametrize(("kind", "sizes", "keys"), LEFT_OUT, ids=lambda value: str(value)[:12])
def test_a_key_that_is_left_out_counts_as_its_config_class_says(
    kind: str, sizes: dict[str, Any], keys: tuple[str, ...], tmp_path: Path
) -> None:
    folder = edit(write_tiny(tmp_path / "model", kind, **sizes), *keys)
    assert far(onnx_logits(folder, tmp_path / "onnx"), torch_logits(folder)) < CLOSE


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2"])
def test_a_head_of_its_own_beside_a_tied_flag_is_kept_through_prune_and_export(
    kind: str, tmp_path: Path
) -> None:
    folder = edit_weights(write_tiny(tmp_path / "model", kind), own_head)
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.shape.tied_embeddings
    assert far(onnx_logits(folder, tmp_path / "onnx"), torch_logits(folder)) < CLOSE
    slice_checkpoint(checkpoint, plan_for(folder), tmp_path / "pruned")
    pruned = Checkpoint.open(tmp_path / "pruned")
    assert torch.equal(pruned.weights.load("lm_head.weight"), checkpoint.weights.load("lm_head.weight"))
    theirs = torch_logits(tmp_path / "pruned")
    assert far(onnx_logits(tmp_path / "pruned", tmp_path / "pruned-onnx"), theirs) < CLOSE


def test_an_encoder_decoder_keeps_a_head_of_its_own(tmp_path: Path) -> None:
    folder = write_t5(tmp_path / "model", "t5")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])

    edit_weights(folder, change)
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.shape.tied_embeddings
    onnx_from_checkpoint(checkpoint, tmp_path / "onnx")
    prompt, answer = IDS[:, :9], IDS[:, 9:14]
    with OrtSeq2Seq(tmp_path / "onnx", threads=1) as runner:
        ours, _ = runner.prefill(prompt, answer=answer)
    start = np.full((1, 1), runner.start_token)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, use_safetensors=True).eval()
    with torch.inference_mode():
        theirs = model(
            torch.from_numpy(prompt), decoder_input_ids=torch.from_numpy(np.concatenate([start, answer], 1))
        ).logits.numpy()
    assert far(ours, theirs) < CLOSE


def test_a_stored_copy_of_the_embedding_stays_a_tied_head(tmp_path: Path) -> None:
    folder = edit_weights(write_tiny(tmp_path / "model", "llama-tied"), same_head)
    assert Checkpoint.open(folder).shape.tied_embeddings
    assert far(onnx_logits(folder, tmp_path / "onnx"), torch_logits(folder)) < CLOSE


def test_a_flag_that_is_left_out_with_a_missing_head_is_refused(tmp_path: Path) -> None:
    folder = edit(write_tiny(tmp_path / "model", "llama-tied"), "tie_word_embeddings")
    with pytest.raises(NirvanaError, match=r"has no tensor 'lm_head\.weight'"):
        Checkpoint.open(folder)


LINEAR = {"rope_type": "linear", "rope_theta": 1e4}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"is_causal": False}, r"attention to later tokens \(is_causal = False\)"),
    ({"use_bidirectional_attention": True}, r"use_bidirectional_attention = True"),
    ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures = \['LlamaForSequenceClass"),
    ({"architectures": ["LlamaModel"]}, r"computes something else than LlamaForCausalLM"),
    ({"architectures": "LlamaForCausalLM"}, r"architectures = 'LlamaForCausalLM'"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_x.Bidirectional"}}, r"names code of its own, auto_map"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_nirvana.X"}}, r"names code of its own"),
    (
        {"quantization_config": {"quant_method": "bitsandbytes_4bit"}},
        r"quant_method 'bitsandbytes_4bit'",
    ),
    ({"quantization_config": {"quant_method": "gptq"}}, r"quant_method 'gptq'"),
    ({"hidden_size": "48"}, r"'hidden_size' expected int, got str"),
    ({"hidden_size": 48.0}, r"'hidden_size' expected int, got float"),
    ({"num_attention_heads": True}, r"'num_attention_heads' expected int, got bool"),
    ({"tie_word_embeddings": "yes"}, r"'tie_word_embeddings' expected bool"),
    ({"rope_parameters": [1]}, r"LlamaConfig of transformers refuses it"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, r"rope_type 'spiral'; supported"),
    (
        {"rope_parameters": LINEAR},
        r"for 'rope_type'='linear'",
    ),
    (
        {"rope_parameters": {**LINEAR, "factor": 0}},
        r"of 8 elements|are no linear rotary embedding",
    ),
    (
        {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "partial_rotary_factor": 0.5,
                "rope_theta": 1e4,
            }
        },
        r"turn 4 of 8 elements",
    ),
    ({"num_hidden_layers": 10**30}, r"'num_hidden_layers' is 1000"),
    ({"num_hidden_layers": 10**9}, r"the most is 10,000 layers"),
    ({"num_hidden_layers": -3}, r"'num_hidden_layers' must be a positive integer, got -3"),
    ({"rms_norm_eps": float("nan")}, r"config.json is not valid JSON: NaN is no number"),
    ({"num_key_value_heads": 0}, r"'num_key_value_heads'"),
    ({"vocab_size": 0}, r"'vocab_size' must be a positive integer"),
    ({"model_type": ["llama"]}, r"Unsupported architecture: model_type \['llama'\]"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_config_that_asks_for_something_else_is_refused_by_name(
    change: dict[str, Any], sentence: str, tiny_llama: Path, tmp_path: Path
) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(NirvanaError, match=sentence):
        Checkpoint.open(tmp_path)


STRAY: list[tuple[str, tuple[int, ...]]] = [
    ("model.layers.0.self_attn.q_proj.bias", (48,)),
    ("model.layers.3.input_layernorm.weight", (48,)),
    ("mtp.layers.0.mlp.up_proj.weight", (40, 48)),
    ("score.weight", (2, 48)),
]


@pytest.mark.parametrize(("name", "shape"), STRAY, ids=lambda value: str(value))
def test_a_tensor_that_nothing_reads_is_named(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama-tied")
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))
    with pytest.raises(NirvanaError, match=f"does not read: {name}"):
        Checkpoint.open(folder)


def test_buffers_of_older_versions_are_no_weights(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama-tied")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert far(onnx_logits(folder, tmp_path / "onnx"), torch_logits(folder)) < CLOSE


def test_weights_that_are_no_floats_are_refused_when_they_are_opened(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama-tied")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(NirvanaError, match=f"'{name}' is stored as I8"):
        Checkpoint.open(folder)
