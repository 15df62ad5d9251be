"""Tiny random models of every supported decoder, with a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from nirvana_deploy.model.checkpoint import norm_offset

VOCABULARY = 272


KINDS: dict[str, Callable[[], Any]] = {
    "llama-tied": lambda: LlamaConfig(**_size(), tie_word_embeddings=True),
    "llama-biased": lambda: LlamaConfig(**_size(), attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**_size(), head_dim=8, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_size(), tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_size(), head_dim=16),
}
"""The kinds that every suite runs on."""

MORE_KINDS: dict[str, Callable[[], Any]] = {
    "mistral-window": lambda: MistralConfig(**_size(), head_dim=16, sliding_window=6),
    "qwen2-window": lambda: Qwen2Config(
        **(_size() | {"hidden_size": 96}),
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_size(),
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "olmo2": lambda: Olmo2Config(**(_size() | {"hidden_size": 96, "intermediate_size": 160})),
    "smollm3": lambda: SmolLM3Config(
        **_size(),
        head_dim=16,
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=7,
    ),
    "granite": lambda: GraniteConfig(
        **_size(),
        head_dim=16,
        embedding_multiplier=3.0,
        residual_multiplier=0.22,
        attention_multiplier=0.1,
        logits_scaling=0.5,
    ),
    "phi3": lambda: Phi3Config(
        **(_size() | {"hidden_size": 192, "intermediate_size": 64}),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        sliding_window=9,
    ),
}
"""One of each further family; ``tests/pipeline/test_families.py`` takes them down the whole arrow."""


INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""First line of a script that is to be interrupted: a shell's background jobs inherit SIGINT ignored."""


def _size() -> dict[str, Any]:
    return {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: every text encodes, one token a byte."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_tiny(
    folder: Path,
    kind: str,
    *,
    dtype: torch.dtype = torch.float32,
    head_dim: int | None = None,
    **save: Any,
) -> Path:
    """Save a random model of ``kind`` with weights large enough that its layers matter."""
    torch.manual_seed(7)
    config = {**KINDS, **MORE_KINDS}[kind]()
    if head_dim is not None:
        config.head_dim = head_dim
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5).sub_(norm_offset(config))
            else:
                parameter.normal_(0.0, 0.15)
    model.to(dtype).save_pretrained(folder, **save)
    write_tokenizer(folder)
    return folder
