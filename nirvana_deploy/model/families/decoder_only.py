"""What decoder-only families share: how their config.json gives a shape, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.config import context_tokens
from nirvana_deploy.model.family import Computation, Family, LayerAttention
from nirvana_deploy.model.shape import LayerShape, ModelShape, positive

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ONNX_HINT = "Deploy the ONNX folder instead: nirvana-deploy export CHECKPOINT --out DIR"
SLIDING = "sliding_attention"
"""In ``layer_types`` of a config: the layers that see ``sliding_window`` tokens."""


def refuse(config: Mapping[str, Any], feature: str, key: str) -> None:
    """Raise NirvanaError when config.json asks for ``feature``, which it does by ``key``."""
    if config.get(key):
        raise NirvanaError(f"Unsupported: config.json asks for {feature} ({key} = {config[key]!r}).")


def windows_by_type(config: PreTrainedConfig) -> Computation:
    """Llama's computation, with a window in the layers that ``layer_types`` says so of."""
    return Computation(layers=tuple(LayerAttention(window=window) for window in layer_windows(config)))


def window_everywhere(config: PreTrainedConfig) -> Computation:
    """Llama's computation, with the window of ``sliding_window``, if any, in every layer."""
    one = LayerAttention(window=getattr(config, "sliding_window", None))
    return Computation(layers=(one,) * config.num_hidden_layers)


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """The window of each layer by ``layer_types``."""
    return [config.sliding_window if kind == SLIDING else None for kind in config.layer_types]


def require_no_window(architecture: str, config: PreTrainedConfig, computation: Computation) -> None:
    """Raise NirvanaError for a layer that sees less than the context: ``architecture`` sees all of it."""
    tokens = context_tokens(config) or 0
    for layer in computation.layers:
        if layer.window is not None and layer.window < tokens:
            raise NirvanaError(
                f"llama.cpp's architecture {architecture!r} attends to all tokens, and layers of this model "
                f"see {layer.window} of {tokens}.",
                hint=ONNX_HINT,
            )


def refuse_activation(config: Mapping[str, Any]) -> None:
    """Raise NirvanaError for an FFN activation other than SiLU."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise NirvanaError(f"Unsupported: hidden_act {config['hidden_act']!r}; supported: 'silu'.")


def shape_with_bias_setting(config: Mapping[str, Any], family: Family) -> ModelShape:
    """The shape where ``attention_bias`` gives biases to q, k, v and o alike."""
    biased = bool(config.get("attention_bias", False))
    return decoder_shape(config, family, attention_bias=biased, output_bias=biased)


def decoder_shape(
    config: Mapping[str, Any], family: Family, *, attention_bias: bool, output_bias: bool = False
) -> ModelShape:
    """The shape of a model with one stack, dense or with ``per_layer_config``."""
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    overrides = {int(k): v for k, v in (config.get("per_layer_config") or {}).items()}
    dense = {
        "num_attention_heads": heads,
        "num_key_value_heads": positive(config, "num_key_value_heads"),
        "intermediate_size": positive(config, "intermediate_size"),
    }
    layers = []
    for index in range(positive(config, "num_hidden_layers")):
        layer = {**dense, **overrides.get(index, {})}
        if layer["num_attention_heads"] % layer["num_key_value_heads"]:
            raise NirvanaError(
                f"config.json: layer {index} has {layer['num_attention_heads']} query heads, "
                f"which is not a multiple of its {layer['num_key_value_heads']} KV heads."
            )
        layers.append(
            LayerShape(
                query_heads=layer["num_attention_heads"],
                kv_heads=layer["num_key_value_heads"],
                ffn_width=layer["intermediate_size"],
            )
        )
    return ModelShape(
        family=family,
        hidden_size=hidden,
        vocab_size=positive(config, "vocab_size"),
        head_dim=hidden // heads if config.get("head_dim") is None else positive(config, "head_dim"),
        layers=tuple(layers),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=attention_bias,
        output_bias=output_bias,
        ffn_bias=bool(config.get("mlp_bias", False)),
    )


def with_widths(config: dict[str, Any], smaller: ModelShape) -> dict[str, Any]:
    """``config`` with the widths of ``smaller``, whose layers are all alike."""
    [layer] = set(smaller.layers)
    return config | {
        "head_dim": smaller.head_dim,
        "num_attention_heads": layer.query_heads,
        "num_key_value_heads": layer.kv_heads,
        "intermediate_size": layer.ffn_width,
        "tie_word_embeddings": smaller.tied_embeddings,
    }
