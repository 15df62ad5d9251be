"""Mistral, whose layers all see a window or all do not; no linear has a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.model.families.decoder_only import (
    decoder_shape,
    refuse_activation,
    window_everywhere,
    with_widths,
)
from nirvana_deploy.model.family import Family, GgufArchitecture
from nirvana_deploy.model.shape import ModelShape

GGUF = GgufArchitecture("llama", pairs_adjacent=True, rope_factors=True)
"""llama.cpp computes Llama and Mistral by one graph."""


def _resolve(config: Mapping[str, Any]) -> Family:
    refuse_activation(config)
    return MISTRAL


def _read_shape(config: Mapping[str, Any], family: Family) -> ModelShape:
    return decoder_shape(config, family, attention_bias=False)


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    resolve=_resolve,
    read_shape=_read_shape,
    stock_config=with_widths,
    computation=window_everywhere,
    genai_type="mistral",
    tried_on="relabelled",
    gguf=GGUF,
)
