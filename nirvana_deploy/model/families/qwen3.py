"""Qwen3: RMS norms on every head of q and k ahead of the rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.model.families.decoder_only import (
    refuse_activation,
    shape_with_bias_setting,
    windows_by_type,
    with_widths,
)
from nirvana_deploy.model.family import Family, GgufArchitecture, Site, Stack


def _resolve(config: Mapping[str, Any]) -> Family:
    refuse_activation(config)
    return QWEN3


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    resolve=_resolve,
    read_shape=shape_with_bias_setting,
    stock_config=with_widths,
    computation=windows_by_type,
    stacks=(Stack(sites=(Site(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),)),),
    genai_type="qwen3",
    gguf=GgufArchitecture("qwen3"),
)
