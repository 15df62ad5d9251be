"""OLMo 2: norms behind attention and FFN alone, and norms over all heads of q and of k together.

Those bind the heads to each other, so neurons alone can go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nirvana_deploy.model.families.decoder_only import (
    refuse_activation,
    shape_with_bias_setting,
    window_everywhere,
    with_widths,
)
from nirvana_deploy.model.family import Computation, Family, GgufArchitecture, Site, Stack

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _resolve(config: Mapping[str, Any]) -> Family:
    refuse_activation(config)
    return OLMO2


def _gguf_settings(config: PreTrainedConfig, computation: Computation) -> dict[str, Any]:
    return {}


OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    resolve=_resolve,
    read_shape=shape_with_bias_setting,
    stock_config=with_widths,
    computation=window_everywhere,
    stacks=(
        Stack(
            sites=(
                Site(
                    input_norm=None,
                    q_norm="self_attn.q_norm",
                    k_norm="self_attn.k_norm",
                    norms_all_heads=True,
                    attention_post_norm="post_attention_layernorm",
                    ffn_norm=None,
                    ffn_post_norm="post_feedforward_layernorm",
                ),
            )
        ),
    ),
    genai_type="olmo",
    gguf=GgufArchitecture("olmo2", square_queries=True, settings=_gguf_settings),
)
