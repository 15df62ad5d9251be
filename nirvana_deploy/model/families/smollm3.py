"""SmolLM3: Llama with layers that do not rotate queries and keys, and perhaps windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.families.decoder_only import (
    ONNX_HINT,
    layer_windows,
    refuse_activation,
    shape_with_bias_setting,
    with_widths,
)
from nirvana_deploy.model.family import Computation, Family, GgufArchitecture, LayerAttention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_GGUF_STEP = 4
"""Every so many layers one does not rotate, in llama.cpp's code."""


def _resolve(config: Mapping[str, Any]) -> Family:
    refuse_activation(config)
    return SMOLLM3


def _computation(config: PreTrainedConfig) -> Computation:
    return Computation(
        layers=tuple(
            LayerAttention(rotary=bool(rotary), window=window)
            for rotary, window in zip(config.no_rope_layers, layer_windows(config), strict=True)
        )
    )


def _gguf_settings(config: PreTrainedConfig, computation: Computation) -> dict[str, Any]:
    wanted = [LayerAttention(rotary=bool((i + 1) % _GGUF_STEP)) for i in range(len(computation.layers))]
    if list(computation.layers) != wanted:
        raise NirvanaError(
            f"llama.cpp's SmolLM3 rotates in all layers but every {_GGUF_STEP}th and has no windows; this "
            f"model has no_rope_layers {config.no_rope_layers} and layer_types {config.layer_types}.",
            hint=ONNX_HINT,
        )
    return {}


SMOLLM3 = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    resolve=_resolve,
    read_shape=shape_with_bias_setting,
    stock_config=with_widths,
    computation=_computation,
    genai_type="smollm3",
    gguf=GgufArchitecture("smollm3", pairs_adjacent=True, rope_factors=True, settings=_gguf_settings),
)
