"""Granite 3, dense: Llama with factors on embeddings, on what is added, on attention and on logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nirvana_deploy.model.families.decoder_only import (
    refuse_activation,
    shape_with_bias_setting,
    with_widths,
)
from nirvana_deploy.model.family import Computation, Family, GgufArchitecture, LayerAttention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _resolve(config: Mapping[str, Any]) -> Family:
    refuse_activation(config)
    return GRANITE


def _computation(config: PreTrainedConfig) -> Computation:
    return Computation(
        layers=(LayerAttention(),) * config.num_hidden_layers,
        embedding_scale=config.embedding_multiplier,
        residual_scale=config.residual_multiplier,
        attention_scale=config.attention_multiplier,
        logits_scale=1 / config.logits_scaling,
    )


def _gguf_settings(config: PreTrainedConfig, computation: Computation) -> dict[str, Any]:
    return {
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "attention.scale": float(config.attention_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


GRANITE = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    resolve=_resolve,
    read_shape=shape_with_bias_setting,
    stock_config=with_widths,
    computation=_computation,
    genai_type="granite",
    gguf=GgufArchitecture("granite", pairs_adjacent=True, rope_factors=True, settings=_gguf_settings),
)
