"""Gemma 3, text: norms before and behind attention and FFN, two rotary embeddings, windows in most layers.

A norm multiplies by 1 + w; rows of the embedding are scaled by sqrt(D); heads of q and k are normed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.families.decoder_only import (
    ONNX_HINT,
    SLIDING,
    layer_windows,
    refuse,
    shape_with_bias_setting,
    with_widths,
)
from nirvana_deploy.model.family import (
    Computation,
    Family,
    GgufArchitecture,
    LayerAttention,
    Site,
    Stack,
)
from nirvana_deploy.model.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ACTIVATION = "gelu_pytorch_tanh"
_GGUF_PATTERN = 6
"""Every so many layers one sees all tokens, in llama.cpp's code."""


def _resolve(config: Mapping[str, Any]) -> Family:
    refuse(config, "soft-capped logits", "final_logit_softcapping")
    refuse(config, "soft-capped attention", "attn_logit_softcapping")
    if config.get("hidden_activation", _ACTIVATION) != _ACTIVATION:
        raise NirvanaError(
            f"Unsupported: hidden_activation {config['hidden_activation']!r}; supported: {_ACTIVATION!r}."
        )
    return GEMMA3


def _computation(config: PreTrainedConfig) -> Computation:
    return Computation(
        layers=tuple(
            LayerAttention(kind=kind, window=window)
            for kind, window in zip(config.layer_types, layer_windows(config), strict=True)
        ),
        activation="gelu_tanh",
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        attention_scale=config.query_pre_attn_scalar**-0.5,
    )


def _gguf_settings(config: PreTrainedConfig, computation: Computation) -> dict[str, Any]:
    """llama.cpp has the pattern of windows and the scale of attention in its code."""
    pattern = [
        SLIDING if (index + 1) % _GGUF_PATTERN else "full_attention"
        for index in range(len(computation.layers))
    ]
    local = config.rope_parameters[SLIDING]
    for what, found, wanted in (
        ("layer_types", config.layer_types, pattern),
        ("query_pre_attn_scalar", config.query_pre_attn_scalar, config.head_dim),
        ("the rotary embedding of windows", local.get("rope_type", "default"), "default"),
    ):
        if found != wanted:
            raise NirvanaError(
                f"llama.cpp's Gemma 3 has {what} = {wanted!r}, this model {found!r}.", hint=ONNX_HINT
            )
    return {
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base_swa": float(local["rope_theta"]),
    }


def _stock_config(config: dict[str, Any], smaller: ModelShape) -> dict[str, Any] | None:
    """Gemma's own config, which refuses head counts that do not divide the hidden size."""
    divides = smaller.hidden_size % smaller.layers[0].query_heads == 0
    return with_widths(config, smaller) if divides else None


GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    config_name="Gemma3TextConfig",
    resolve=_resolve,
    read_shape=shape_with_bias_setting,
    stock_config=_stock_config,
    computation=_computation,
    stacks=(
        Stack(
            sites=(
                Site(
                    q_norm="self_attn.q_norm",
                    k_norm="self_attn.k_norm",
                    attention_post_norm="post_attention_layernorm",
                    ffn_norm="pre_feedforward_layernorm",
                    ffn_post_norm="post_feedforward_layernorm",
                ),
            )
        ),
    ),
    # the config class compares head numbers while it loads
    own_settings=(("allow_global_per_layer_attribute_access", True),),
    genai_type="gemma3_text",
    tried_on="real",
    gguf=GgufArchitecture("gemma3", settings=_gguf_settings),
)
