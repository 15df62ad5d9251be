"""The shape of a model, per layer: the one place where dimensions are read.

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

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.families import DECODER, Family, Site, family_of


@dataclass(frozen=True)
class LayerShape:
    """Dimensions of one layer: an attention and the FFN behind it."""

    query_heads: int
    """H: query heads."""
    kv_heads: int
    """K: KV heads; a KV group is one KV head with its H/K query heads."""
    ffn_width: int
    """F: FFN neurons; 0 for a cross-attention, which has no FFN of its own."""
    site: str = DECODER
    """Which kind of layer it is: a site of the family."""


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
    """In the order of the family's sites; the layers of one site are numbered from 0."""
    tied_embeddings: bool
    attention_bias: bool
    """q, k and v have biases."""
    output_bias: bool
    """o has a bias too (Llama with ``attention_bias``); it belongs to no group and stays whole."""
    ffn_bias: bool
    position_bias: tuple[int, int] = (0, 0)
    """[buckets, H] of the shared relative position bias (T5), H heads of the dense model."""

    def place(self, position: int) -> tuple[Site, str]:
        """The module names of ``layers[position]``, and the prefix that they are relative to."""
        site = self.family.site(self.layers[position].site)
        return site, site.layer(self.number(position))

    def number(self, position: int) -> int:
        """The number of ``layers[position]`` within its site."""
        return sum(layer.site == self.layers[position].site for layer in self.layers[:position])

    def label(self, position: int) -> str:
        """``layers[position]`` for people: "Layer 3", or "Layer 3 (encoder)" in an encoder-decoder."""
        kind = f" ({self.layers[position].site})" if self.family.encoder_decoder else ""
        return f"Layer {self.number(position)}{kind}"

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
        """c_m: weights of one FFN neuron in units of D: 3 (gate, up, down), or 2 for an ungated FFN."""
        return len(self.family.decoder.ffn_rows) + 1

    @property
    def linear_parameters(self) -> int:
        """Weights of all linears but the head: what "sparsity" is a share of."""
        return sum(self.site_parameters(site.name) for site in self.family.sites)

    def site_parameters(self, site: str) -> int:
        """Weights of the linears in the layers of one site."""
        units = sum(
            layer.kv_heads * self.group_cost + layer.ffn_width * self.neuron_cost
            for layer in self.layers
            if layer.site == site
        )
        return units * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Weights of embedding and head; a tied pair counts once."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    def kv_cache_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes that one written token of one sequence adds to the KV cache."""
        heads = sum(layer.kv_heads for layer in self.layers if layer.site == DECODER)
        return 2 * heads * self.head_dim * element_bytes


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Read the shape from a parsed ``config.json``, dense or with ``per_layer_config``.

    Raises NirvanaError for an unsupported architecture or a field that is missing or inconsistent.
    """
    family = family_of(config)
    if family.encoder_decoder:
        return _encoder_decoder_shape(config, family)

    def required(key: str) -> int:
        return _positive(config, key)

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


def _encoder_decoder_shape(config: Mapping[str, Any], family: Family) -> ModelShape:
    """The same for T5, whose config has its own words; dense, or with ``pruned_layers``."""
    heads, width, depth = (_positive(config, key) for key in ("num_heads", "d_ff", "num_layers"))
    decoder_depth = config.get("num_decoder_layers") or depth
    pruned = config.get("pruned_layers")
    layers = []
    for site in family.sites:
        dense: dict[str, Any] = {"kept_heads": range(heads), "d_ff": width if site.ffn_rows else 0}
        for index in range(depth if site.name == "encoder" else decoder_depth):
            layer = pruned[site.name][index] if pruned else dense
            kept = len(layer["kept_heads"])
            layers.append(LayerShape(kept, kept, ffn_width=layer["d_ff"], site=site.name))
    # transformers 5 writes tie_word_embeddings true for every T5; the scale tells which kind it was
    tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", family.tied_by_default))
    return ModelShape(
        family=family,
        hidden_size=_positive(config, "d_model"),
        vocab_size=_positive(config, "vocab_size"),
        head_dim=_positive(config, "d_kv"),
        layers=tuple(layers),
        tied_embeddings=bool(tied),
        attention_bias=False,
        output_bias=False,
        ffn_bias=False,
        position_bias=(config.get("relative_attention_num_buckets", 32), heads),
    )


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise NirvanaError(f"config.json: {key!r} must be a positive integer, got {value!r}.")
    return value
