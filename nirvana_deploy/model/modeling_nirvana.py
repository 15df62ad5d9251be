# mypy: ignore-errors
# (this file travels: it runs under whatever transformers, typed or not, the reader has)
"""Decoder models whose layers differ in width: the module that travels with a pruned checkpoint.

This file is copied beside the weights and loaded by transformers with ``trust_remote_code=True``; it
needs nothing but transformers. Each layer takes ``num_attention_heads``, ``num_key_value_heads`` and
``intermediate_size`` from ``config.per_layer_config``. Whole KV groups were removed, so the number of
query heads per KV head is the dense model's, and the attention code of transformers applies as it is.
"""

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_PERMISSION = "allow_global_per_layer_attribute_access"


def _resized(linear, *, inputs=None, outputs=None):
    """A new Linear on the same device and dtype, with the given sizes in place of the old ones."""
    return nn.Linear(
        inputs or linear.in_features,
        outputs or linear.out_features,
        bias=linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )


def _resize_layer(layer, config, head_dim):
    """Give one decoder layer the dimensions of its own config."""
    attention, mlp = layer.self_attn, layer.mlp
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    attention.q_proj = _resized(attention.q_proj, outputs=queries)
    attention.k_proj = _resized(attention.k_proj, outputs=keys)
    attention.v_proj = _resized(attention.v_proj, outputs=keys)
    attention.o_proj = _resized(attention.o_proj, inputs=queries)
    mlp.gate_proj = _resized(mlp.gate_proj, outputs=config.intermediate_size)
    mlp.up_proj = _resized(mlp.up_proj, outputs=config.intermediate_size)
    mlp.down_proj = _resized(mlp.down_proj, inputs=config.intermediate_size)


class _PerLayerWidths:
    """Mixin: build the dense skeleton, then give every layer its own widths.

    The skeleton is built with the per-layer values set aside, since a heterogeneous config refuses to
    answer for the whole model. ``from_pretrained`` builds on the meta device, so nothing is allocated.
    """

    def __init__(self, config):
        widths = config.__dict__.pop("_heterogeneity_spec", None)
        try:
            super().__init__(config)
        finally:
            if widths is not None:
                config.__dict__["_heterogeneity_spec"] = widths
        for layer, layer_config in zip(self.model.layers, config.per_layer_config, strict=True):
            _resize_layer(layer, layer_config, layer.self_attn.head_dim)
        self.post_init()


class NirvanaLlamaConfig(LlamaConfig):
    """A Llama config with per-layer widths; the dense model's numbers stay as the global ones.

    LlamaConfig compares the global widths whenever it validates, which a heterogeneous config refuses to
    answer. So the dense numbers are validated first, and the per-layer ones are applied after.
    """

    def __init__(self, *args, per_layer_config=None, **kwargs):
        kwargs.pop(_PERMISSION, None)
        super().__init__(*args, **kwargs)
        self.per_layer_config = per_layer_config

    def validate(self):
        """Skip LlamaConfig's comparison: the dense numbers passed it when the object was made."""

    def to_dict(self):
        """The config as JSON, with the permission without which LlamaConfig itself cannot open it."""
        return {**super().to_dict(), _PERMISSION: True}


class NirvanaMistralConfig(MistralConfig):
    """A Mistral config with per-layer widths; the dense model's numbers stay as the global ones."""


class NirvanaQwen2Config(Qwen2Config):
    """A Qwen2 config with per-layer widths; the dense model's numbers stay as the global ones."""


class NirvanaQwen3Config(Qwen3Config):
    """A Qwen3 config with per-layer widths; the dense model's numbers stay as the global ones."""


class NirvanaLlamaForCausalLM(_PerLayerWidths, LlamaForCausalLM):
    """Llama with KV groups and FFN neurons removed layer by layer."""

    config_class = NirvanaLlamaConfig


class NirvanaMistralForCausalLM(_PerLayerWidths, MistralForCausalLM):
    """Mistral with KV groups and FFN neurons removed layer by layer."""

    config_class = NirvanaMistralConfig


class NirvanaQwen2ForCausalLM(_PerLayerWidths, Qwen2ForCausalLM):
    """Qwen2 with KV groups and FFN neurons removed layer by layer; q, k and v keep their biases."""

    config_class = NirvanaQwen2Config


class NirvanaQwen3ForCausalLM(_PerLayerWidths, Qwen3ForCausalLM):
    """Qwen3 with KV groups and FFN neurons removed layer by layer; the norms of a head stay whole."""

    config_class = NirvanaQwen3Config
