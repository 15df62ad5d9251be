"""Tiny random T5 and Flan-T5 checkpoints with stacks of unequal depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from builders.tiny import VOCABULARY, write_tokenizer
from nirvana_deploy.model.checkpoint import config_json

KINDS: dict[str, dict[str, Any]] = {
    "t5": {"feed_forward_proj": "relu"},
    "flan-t5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def write_t5(folder: Path, kind: str) -> Path:
    """A random T5 with stacks of unequal depth, saved the way the hub's checkpoints are."""
    torch.manual_seed(7)
    size = {
        "d_model": 48,
        "d_kv": 8,
        "d_ff": 40,
        "num_heads": 5,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "vocab_size": VOCABULARY,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "decoder_start_token_id": 0,
    }
    model = T5ForConditionalGeneration(T5Config(**size, **KINDS[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in name:
                parameter.normal_(0.0, 1.0)
            else:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    config = config_json(folder) | KINDS[kind] | {"architectures": ["T5ForConditionalGeneration"]}
    del config["scale_decoder_outputs"]
    if kind == "t5":
        del config["tie_word_embeddings"]  # the hub's T5 does not say
    else:
        tensors["lm_head.weight"] = torch.randn(VOCABULARY, 48) * 0.15
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
