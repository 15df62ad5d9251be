"""Phi-3: q, k and v are one linear, gate and up another; heads are perhaps rotated in part.

Its long-context versions and Phi-4-mini have "longrope" (``model/rope.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nirvana_deploy.model.families.decoder_only import (
    decoder_shape,
    refuse_activation,
    with_widths,
)
from nirvana_deploy.model.family import Computation, Family, LayerAttention, Site, Stack
from nirvana_deploy.model.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _resolve(config: Mapping[str, Any]) -> Family:
    refuse_activation(config)
    return PHI3


def _read_shape(config: Mapping[str, Any], family: Family) -> ModelShape:
    return decoder_shape(config, family, attention_bias=False)


def _computation(config: PreTrainedConfig) -> Computation:
    return Computation(
        layers=(LayerAttention(window=config.sliding_window),) * config.num_hidden_layers,
        rotary_share=config.rope_parameters.get("partial_rotary_factor", 1.0),
    )


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    resolve=_resolve,
    read_shape=_read_shape,
    stock_config=with_widths,
    computation=_computation,
    stacks=(
        Stack(
            sites=(
                Site(
                    q="self_attn.qkv_proj.q_proj",
                    k="self_attn.qkv_proj.k_proj",
                    v="self_attn.qkv_proj.v_proj",
                    ffn_rows=("mlp.gate_up_proj.gate_proj", "mlp.gate_up_proj.up_proj"),
                    fused=("self_attn.qkv_proj", "mlp.gate_up_proj"),
                ),
            )
        ),
    ),
    genai_type="phi3",
)
