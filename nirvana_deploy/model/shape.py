"""The shape of a decoder-only model, per layer: the one place where dimensions are read.

After pruning, ``hidden_size // num_attention_heads`` is false and layers differ, so nothing downstream
derives a dimension; everything reads it here.

Dimension letters, used in every tensor docstring of this project:
N sequences, T tokens, V vocabulary, L layers, D hidden, H query heads, K KV heads, G groups kept,
d head_dim, F FFN width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.model.families import Family, family_of


@dataclass(frozen=True)
class LayerShape:
    """Dimensions of one decoder layer."""

    query_heads: int
    """H: query heads."""
    kv_heads: int
    """K: KV heads; a KV group is one KV head with its H/K query heads."""
    ffn_width: int
    """F: FFN neurons."""


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a whole model, read from its config (dense or pruned)."""

    family: Family
    hidden_size: int
    """D."""
    vocab_size: int
    """V."""
    head_dim: int
    """d: read from the config, never derived from a pruned layer."""
    layers: tuple[LayerShape, ...]
    tied_embeddings: bool
    attention_bias: bool
    """q, k and v have biases."""
    output_bias: bool
    """o has a bias too (Llama with ``attention_bias``); it belongs to no group and stays whole."""
    ffn_bias: bool

    @property
    def query_heads_per_group(self) -> int:
        """g = H/K; pruning removes whole KV groups, so it is the same in every layer."""
        return self.layers[0].query_heads // self.layers[0].kv_heads

    @property
    def group_cost(self) -> int:
        """c_a = 2 d (g+1): weights of one KV group in units of D [NIRVANA: q and o rows of g heads, k, v]."""
        return 2 * self.head_dim * (self.query_heads_per_group + 1)

    @property
    def neuron_cost(self) -> int:
        """c_m: weights of one FFN neuron in units of D (gate, up and down)."""
        return len(self.family.ffn_rows) + 1

    @property
    def linear_parameters(self) -> int:
        """Weights of all decoder linears: what "sparsity" is a share of."""
        units = sum(
            layer.kv_heads * self.group_cost + layer.ffn_width * self.neuron_cost for layer in self.layers
        )
        return units * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Weights of embedding and head; a tied pair counts once."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    def kv_cache_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes that one token of one sequence adds to the KV cache."""
        return sum(2 * layer.kv_heads * self.head_dim * element_bytes for layer in self.layers)


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Read the shape from a parsed ``config.json``, dense or with ``per_layer_config``.

    Raises NirvanaError for an unsupported architecture or a field that is missing or inconsistent.
    """
    family = family_of(config)

    def required(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or value <= 0:
            raise NirvanaError(f"config.json: {key!r} must be a positive integer, got {value!r}.")
        return value

    hidden, heads = required("hidden_size"), required("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    overrides = {int(k): v for k, v in (config.get("per_layer_config") or {}).items()}
    layers = []
    for index in range(required("num_hidden_layers")):
        layer = {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": required("intermediate_size"),
            **overrides.get(index, {}),
        }
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
    attention_bias = family.attention_bias
    return ModelShape(
        family=family,
        hidden_size=hidden,
        vocab_size=required("vocab_size"),
        head_dim=config.get("head_dim") or hidden // heads,
        layers=tuple(layers),
        tied_embeddings=bool(config.get("tie_word_embeddings", family.tied_by_default)),
        attention_bias=bool(config.get("attention_bias", False))
        if attention_bias == "config"
        else attention_bias == "qkv",
        output_bias=bool(config.get("attention_bias", False)) if attention_bias == "config" else False,
        ffn_bias=bool(config.get("mlp_bias", False)),
    )
