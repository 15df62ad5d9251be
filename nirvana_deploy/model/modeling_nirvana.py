# mypy: ignore-errors
# (this file travels: it runs under whatever transformers, typed or not, the reader has)
"""Models whose layers differ in width: the module that travels with a pruned checkpoint.

This file is copied beside the weights and loaded by transformers with ``trust_remote_code=True``; it
needs nothing but transformers. Each decoder-only layer takes ``num_attention_heads``,
``num_key_value_heads`` and ``intermediate_size`` from ``config.per_layer_config``. Whole KV groups were
removed, so the number of query heads per KV head is the dense model's, and the attention code of
transformers applies as it is. T5 takes ``kept_heads`` and ``d_ff`` from ``config.pruned_layers``.
"""

import copy
import sys

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

_PERMISSION = "allow_global_per_layer_attribute_access"
_OURS = "Nirvana"


def _resized(linear, *, inputs=None, outputs=None):
    """A new Linear on the same device and dtype, with the given sizes in place of the old ones."""
    return nn.Linear(
        inputs or linear.in_features,
        outputs or linear.out_features,
        bias=linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )


class _OwnHeads:
    """The config of a model with the number of query heads of one layer."""

    def __init__(self, config, heads):
        self._config, self.num_attention_heads = config, heads

    def __getattr__(self, name):
        return getattr(self._config, name)


def _resize_layer(layer, config, head_dim):
    """Give one decoder layer the dimensions of its own config."""
    attention, mlp = layer.self_attn, layer.mlp
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    attention.o_proj = _resized(attention.o_proj, inputs=queries)
    mlp.down_proj = _resized(mlp.down_proj, inputs=config.intermediate_size)
    if hasattr(attention, "qkv_proj"):  # it finds the border of q and k by its config
        attention.qkv_proj = _resized(attention.qkv_proj, outputs=queries + 2 * keys)
        mlp.gate_up_proj = _resized(mlp.gate_up_proj, outputs=2 * config.intermediate_size)
        attention.config = _OwnHeads(attention.config, config.num_attention_heads)
        attention.num_key_value_heads = config.num_key_value_heads
        return
    attention.q_proj = _resized(attention.q_proj, outputs=queries)
    attention.k_proj = _resized(attention.k_proj, outputs=keys)
    attention.v_proj = _resized(attention.v_proj, outputs=keys)
    mlp.gate_proj = _resized(mlp.gate_proj, outputs=config.intermediate_size)
    mlp.up_proj = _resized(mlp.up_proj, outputs=config.intermediate_size)


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
        self.model.rotary_emb.config = dense = copy.copy(config)  # its angles are the dense model's
        dense.__dict__.pop("_heterogeneity_spec", None)
        for layer, layer_config in zip(self.model.layers, config.per_layer_config, strict=True):
            _resize_layer(layer, layer_config, layer.self_attn.head_dim)
        self.post_init()


class _PerLayerConfig:
    """Mixin: a config with per-layer widths; the dense model's numbers stay as the global ones.

    Some classes compare the global widths whenever they validate, which a heterogeneous config refuses to
    answer. So the dense numbers are validated first, and the per-layer ones are applied after.
    """

    def __init__(self, *args, per_layer_config=None, **kwargs):
        kwargs.pop(_PERMISSION, None)
        super().__init__(*args, **kwargs)
        self.per_layer_config = per_layer_config

    def validate(self):
        """Skip the comparison: the dense numbers passed it when the object was made."""

    def to_dict(self):
        """The config as JSON, with the permission without which the class itself cannot open it."""
        return {**super().to_dict(), _PERMISSION: True}


def __getattr__(name):
    """``Nirvana<Class>`` is a decoder or a config of transformers, <Class>, with layers of other widths."""
    base = getattr(transformers, name.removeprefix(_OURS), None) if name.startswith(_OURS) else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(base, PreTrainedConfig):
        made = type(name, (_PerLayerConfig, base), {"__module__": __name__})
    else:
        assert issubclass(base, PreTrainedModel)
        own_config = getattr(sys.modules[__name__], _OURS + base.config_class.__name__)
        body = {"__module__": __name__, "config_class": own_config, "config": None}
        made = type(name, (_PerLayerWidths, base), body)
    globals()[name] = made
    return made


class _T5SelfAttention(T5Attention):
    """T5 self-attention that kept some heads, beside a position bias that all layers of a stack share.

    The shared bias [1, H, queries, keys] is computed in the first layer with every head of the dense model
    and handed on whole; each layer adds the part of its own heads.
    """

    def __init__(self, dense, kept_heads):
        super().__init__(
            dense.config,
            dense.has_relative_attention_bias,
            layer_idx=dense.layer_idx,
            is_causal=dense.is_causal,
        )
        self.kept_heads = kept_heads
        _resize_t5_attention(self, len(kept_heads))

    def compute_bias(self, *args, **kwargs):
        """The position bias of this layer's own heads."""
        return super().compute_bias(*args, **kwargs)[:, self.kept_heads]

    def forward(self, hidden_states, mask=None, position_bias=None, past_key_values=None, **kwargs):
        """As in T5; takes and returns the position bias of all heads."""
        past_tokens = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        if isinstance(past_tokens, torch.Tensor):
            past_tokens = past_tokens.clone()  # a static cache counts up in place
        own_bias = None if position_bias is None else position_bias[:, self.kept_heads]
        output, own_bias, weights = super().forward(
            hidden_states, mask=mask, position_bias=own_bias, past_key_values=past_key_values, **kwargs
        )
        if position_bias is None:
            position_bias = super().compute_bias(
                hidden_states.shape[1], own_bias.shape[-1], hidden_states.device, past_tokens
            )
        return output, position_bias, weights


class _T5CrossAttention(T5Attention):
    """T5 cross-attention that kept some heads; it has no position bias to share with other layers."""

    def __init__(self, dense, heads):
        super().__init__(dense.config, layer_idx=dense.layer_idx, is_causal=dense.is_causal)
        _resize_t5_attention(self, heads)

    def forward(self, hidden_states, position_bias=None, **kwargs):
        """As in T5, without the zeros that T5 hands from layer to layer, whose heads are too many or few."""
        output, _, weights = super().forward(hidden_states, **kwargs)
        return output, None, weights


def _resize_t5_attention(attention, heads):
    width = heads * attention.key_value_proj_dim
    attention.n_heads, attention.inner_dim = heads, width
    attention.q = _resized(attention.q, outputs=width)
    attention.k = _resized(attention.k, outputs=width)
    attention.v = _resized(attention.v, outputs=width)
    attention.o = _resized(attention.o, inputs=width)


def _resize_t5_block(block, layer):
    """Give one block of either stack the self-attention heads and the FFN width that it kept."""
    block.layer[0].SelfAttention = _T5SelfAttention(block.layer[0].SelfAttention, layer["kept_heads"])
    ffn = block.layer[-1].DenseReluDense
    for name in ("wi", "wi_0", "wi_1"):
        if hasattr(ffn, name):
            setattr(ffn, name, _resized(getattr(ffn, name), outputs=layer["d_ff"]))
    ffn.wo = _resized(ffn.wo, inputs=layer["d_ff"])


class NirvanaT5Config(T5Config):
    """A T5 config with ``pruned_layers``: what every layer of "encoder", "decoder" and "cross" kept."""


class NirvanaT5ForConditionalGeneration(T5ForConditionalGeneration):
    """T5 or Flan-T5 with heads and FFN neurons removed layer by layer, in both stacks."""

    config_class = NirvanaT5Config

    def __init__(self, config):
        super().__init__(config)
        layers = config.pruned_layers
        for stack, name in ((self.encoder, "encoder"), (self.decoder, "decoder")):
            for block, layer in zip(stack.block, layers[name], strict=True):
                _resize_t5_block(block, layer)
        for block, layer in zip(self.decoder.block, layers["cross"], strict=True):
            cross = block.layer[1]
            cross.EncDecAttention = _T5CrossAttention(cross.EncDecAttention, len(layer["kept_heads"]))
        self.post_init()
