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
from nirvana_deploy.model.family import DECODER, Family, Site


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
        """``layers[position]`` for people: "Layer 3", or "Layer 3 (encoder)" with several sites."""
        kind = f" ({self.layers[position].site})" if len(self.family.sites) > 1 else ""
        return f"Layer {self.number(position)}{kind}"

    def removable_groups(self, position: int) -> int:
        """How many KV groups ``layers[position]`` can lose: all but one, or none where heads are bound."""
        bound = self.place(position)[0].norms_all_heads
        return 0 if bound else self.layers[position].kv_heads - 1

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


def positive(config: Mapping[str, Any], key: str) -> int:
    """``config[key]``; raises NirvanaError unless it is a positive integer."""
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise NirvanaError(f"config.json: {key!r} must be a positive integer, got {value!r}.")
    return value
