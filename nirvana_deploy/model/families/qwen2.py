"""Qwen2 and Qwen2.5: q, k and v always have biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.model.families.decoder_only import (
    decoder_shape,
    refuse_activation,
    windows_by_type,
    with_widths,
)
from nirvana_deploy.model.family import Family, GgufArchitecture
from nirvana_deploy.model.shape import ModelShape


def _resolve(config: Mapping[str, Any]) -> Family:
    refuse_activation(config)
    return QWEN2


def _read_shape(config: Mapping[str, Any], family: Family) -> ModelShape:
    return decoder_shape(config, family, attention_bias=True)


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    resolve=_resolve,
    read_shape=_read_shape,
    stock_config=with_widths,
    computation=windows_by_type,
    genai_type="qwen2",
    tried_on="relabelled",
    gguf=GgufArchitecture("qwen2", square_queries=True),
)
