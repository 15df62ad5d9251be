"""Llama, and what computes the same: SmolLM2, TinyLlama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.model.config import completed
from nirvana_deploy.model.families.decoder_only import (
    refuse,
    refuse_activation,
    shape_with_bias_setting,
    window_everywhere,
    with_widths,
)
from nirvana_deploy.model.families.mistral import GGUF, MISTRAL
from nirvana_deploy.model.family import Family
from nirvana_deploy.model.shape import ModelShape

_SAID_OTHERWISE = (
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
)
"""Keys whose default may be another one in MistralConfig."""
_NOT_IN_MISTRAL = ("attention_bias", "mlp_bias", "pretraining_tp", "rope_theta", "rope_scaling")


def _resolve(config: Mapping[str, Any]) -> Family:
    refuse(config, "sliding-window attention", "sliding_window")
    refuse_activation(config)
    return LLAMA


def _stock_config(config: dict[str, Any], smaller: ModelShape) -> dict[str, Any] | None:
    """Llama's own config, else Mistral's: the same function without biases.

    LlamaConfig refuses head counts that do not divide the hidden size, even with an explicit ``head_dim``.
    """
    if smaller.hidden_size % smaller.layers[0].query_heads == 0:
        return with_widths(config, smaller)
    if smaller.attention_bias or smaller.output_bias or smaller.ffn_bias:
        return None
    full = completed(config, LLAMA)
    said = {key: full[key] for key in _SAID_OTHERWISE} | config
    kept = {key: value for key, value in said.items() if key not in _NOT_IN_MISTRAL}
    relabelled = {"architectures": [MISTRAL.architecture], "model_type": MISTRAL.name, "sliding_window": None}
    return with_widths(kept | relabelled, smaller)


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    resolve=_resolve,
    read_shape=shape_with_bias_setting,
    stock_config=_stock_config,
    computation=window_everywhere,
    # LlamaConfig compares head numbers while it loads; without this the stock class cannot open the file
    own_settings=(("allow_global_per_layer_attribute_access", True),),
    genai_type="llama",
    tried_on="real",
    gguf=GGUF,
)
