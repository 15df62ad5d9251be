"""Random models of odd configs, each by its number: what transformers reads, or would misread."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from builders.odd import edit
from builders.tiny import VOCABULARY, write_tokenizer
from nirvana_deploy.model.checkpoint import norm_offset

SEED = 15
_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma3": "Gemma3",
    "olmo2": "Olmo2",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "phi3": "Phi3",
}
_SQUARE = ("llama", "gemma3", "olmo2", "smollm3", "granite", "phi3")
"""Whose hidden size is that of its heads together."""
_CONFIGS = {"gemma3": "Gemma3TextConfig"}
_ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "theta": {"rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "partial": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
}
_KEYS = (
    "architectures",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "layer_types",
    "max_position_embeddings",
    "mlp_bias",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
)
"""What may be left out of config.json."""
_ODD_VALUES: tuple[dict[str, Any], ...] = (
    {"is_causal": False},
    {"hidden_act": "gelu"},
    {"num_hidden_layers": 1},
    {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
    {"rms_norm_eps": 0.3},
    {"vocab_size": VOCABULARY + 1},
    {"tie_word_embeddings": 1},
    {"architectures": ["LlamaForSequenceClassification"]},
    {"rope_theta": 777.0},
    {"rope_scaling": {"type": "linear", "factor": 3.0}},
)


@dataclass(frozen=True)
class OddModel:
    """A folder, and how it was made, for the message of a test."""

    folder: Path
    made: str


def write_odd_model(folder: Path, number: int) -> OddModel:
    """Write the model of this ``number``: the same number, the same model."""
    random = np.random.default_rng((SEED, number))
    torch.manual_seed(number)
    kind = str(random.choice(list(_CLASSES)))
    sizes = _sizes(random, kind)
    rope = str(random.choice(list(_ROPES), p=[0.3, 0.15, 0.15, 0.15, 0.15, 0.05, 0.05]))
    config = getattr(transformers, _CONFIGS.get(kind, f"{_CLASSES[kind]}Config"))(
        **sizes, rope_parameters=_rope_parameters(kind, rope, sizes["head_dim"])
    )
    dtype = random.choice(["float32", "bfloat16", "float16"])
    model = getattr(transformers, f"{_CLASSES[kind]}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5).sub_(norm_offset(config))
            else:
                parameter.normal_(0.0, 0.15)
    shards = {"max_shard_size": "20KB"} if random.random() < 0.3 else {}
    model.to(getattr(torch, dtype)).save_pretrained(folder, **shards)
    write_tokenizer(folder)
    edits = [f"{kind} {sizes} {rope} {dtype} {shards}"]
    if random.random() < 0.4:
        dropped = [str(key) for key in random.choice(_KEYS, size=int(random.integers(1, 5)), replace=False)]
        edit(folder, *dropped)
        edits.append(f"without {dropped}")
    if random.random() < 0.25:
        odd = _ODD_VALUES[int(random.integers(len(_ODD_VALUES)))]
        edit(folder, **odd)
        edits.append(f"with {odd}")
    if not shards and random.random() < 0.35:
        edits.append(_odd_weights(folder, random))
    return OddModel(folder, "; ".join(edits))


def _sizes(random: np.random.Generator, kind: str) -> dict[str, Any]:
    kv_heads, per_group = int(random.integers(1, 5)), int(random.integers(1, 4))
    heads = kv_heads * per_group
    head_dim = int(random.choice([4, 8, 10, 16]))
    square = kind in _SQUARE or random.random() < 0.4
    hidden = heads * head_dim if square else int(random.choice([24, 40, 56]))
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": int(random.choice([16, 24, 36])),
        "num_hidden_layers": int(random.integers(1, 4)),
        "vocab_size": VOCABULARY,
        "max_position_embeddings": int(random.choice([64, 256, 2048])),
        "tie_word_embeddings": bool(random.random() < 0.5),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "mistral":
        sizes["sliding_window"] = None
    sizes |= _own_sizes(random, kind)
    if kind in ("llama", "qwen3"):
        sizes["attention_bias"] = bool(random.random() < 0.4)
    if kind == "llama":
        sizes["mlp_bias"] = bool(random.random() < 0.3)
    return sizes


def _own_sizes(random: np.random.Generator, kind: str) -> dict[str, Any]:
    """What the later families add."""
    if kind == "gemma3":
        return {"query_pre_attn_scalar": int(random.choice([8, 24])), "sliding_window": 6}
    if kind == "smollm3":
        return {"no_rope_layer_interval": int(random.choice([1, 2, 4]))}
    if kind == "granite":
        return {
            "embedding_multiplier": float(random.choice([1.0, 3.0])),
            "residual_multiplier": float(random.choice([0.22, 1.0])),
            "attention_multiplier": float(random.choice([0.1, 0.35])),
            "logits_scaling": float(random.choice([0.5, 4.0])),
        }
    return {}


def _rope_parameters(kind: str, rope: str, head_dim: int) -> dict[str, Any]:
    """The one rotary embedding of a model; Gemma's sliding layers have another one of their own."""
    chosen = {"rope_type": "default", "rope_theta": 1e4, **_ROPES[rope]}
    if kind == "phi3":  # which knows one other kind
        if rope != "llama3":
            return {"rope_type": "default", "rope_theta": chosen["rope_theta"]}
        factors = [1.0 + 0.5 * pair for pair in range(head_dim // 2)]
        trained = {"original_max_position_embeddings": 64, "factor": 2.0, "rope_theta": 1e4}
        return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors[::-1], **trained}
    if kind != "gemma3":
        return chosen
    sliding = {"rope_type": "default", "rope_theta": 100.0}
    return {"sliding_attention": sliding, "full_attention": chosen}


def _odd_weights(folder: Path, random: np.random.Generator) -> str:
    """Change the stored tensors in one way; returns which."""
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    way = str(random.choice(["own head", "same head", "no head", "a stray bias", "old buffers", "an index"]))
    if way == "own head":
        tensors["lm_head.weight"] = torch.randn_like(embedding) * 0.2
    elif way == "same head":
        tensors["lm_head.weight"] = embedding.clone()
    elif way == "no head":
        tensors.pop("lm_head.weight", None)
    elif way == "a stray bias":
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.ones(len(tensors["model.norm.weight"]))
    elif way == "old buffers":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    else:  # beside the single file, and of no use
        places = dict.fromkeys(tensors, "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return way
