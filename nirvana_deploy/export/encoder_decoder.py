"""T5 and Flan-T5 as two ONNX graphs, encoder and decoder: standard operators of opset 23, no control flow.

The decoder serves the first step and all later ones: its cross-attention keys and values are ``past ++
project(encoder_hidden_states[:, length of past:])``, so they are computed once. The additive float mask of
``Attention`` holds the relative position bias, the causal order and the padding; T5 does not scale.

Dimension letters as in ``model/shape.py``; B sequences of a batch, E encoder tokens, S past plus new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.decoder import hidden_state_name
from nirvana_deploy.export.dtypes import Dtype
from nirvana_deploy.export.parts import GraphParts
from nirvana_deploy.export.streaming import Parameter, as_array
from nirvana_deploy.model.family import DECODER
from nirvana_deploy.model.shape import LayerShape, ModelShape
from nirvana_deploy.output.layout import DTYPE_KEY, GRAPH_SCHEMA, SCHEMA_KEY

_ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "swish")
_OPSET = 23
_TO_THE_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Weights:
    """Where the graphs' weights come from, by precision."""

    dtype: Dtype
    """Of linears, embedding, caches and logits."""
    narrow: Parameter
    """Weights in ``dtype``."""
    wide: Parameter
    """Weights in float32: the norms and, for float16, the FFN's ``wo``. The residual stream is float32 too:
    its sums leave float16's range in real T5 models, and transformers keeps the same weights."""


@dataclass(frozen=True)
class T5Recipe:
    """What a T5 computes, beyond its dimensions."""

    norm_epsilon: float
    activation: str
    head_scale: float
    """Factor between the final norm and the head: D^-0.5 for a tied head, else 1."""
    max_distance: int
    """Relative positions from here on share a bucket."""
    kept_heads: Mapping[str, tuple[tuple[int, ...], ...]]
    """Site -> layer -> its heads among those of the dense model, whose bias is shared."""


def recipe_from_config(config: Any, shape: ModelShape) -> T5Recipe:
    """Read the recipe of a dense or pruned T5; raises NirvanaError for an activation without operator."""
    if config.dense_act_fn not in _ACTIVATIONS:
        raise NirvanaError(
            f"Unsupported: feed_forward_proj {config.feed_forward_proj!r}; "
            f"the activations that can be exported are {', '.join(_ACTIVATIONS)}."
        )
    if shape.position_bias[0] // 2 >= config.relative_attention_max_distance:
        raise NirvanaError(
            f"config.json: a relative_attention_max_distance of {config.relative_attention_max_distance} "
            f"leaves no room for {shape.position_bias[0]} relative_attention_num_buckets."
        )
    pruned = getattr(config, "pruned_layers", None)
    heads: dict[str, tuple[tuple[int, ...], ...]] = {}
    for site in shape.family.sites:
        count = sum(layer.site == site.name for layer in shape.layers)
        whole = tuple(range(shape.position_bias[1]))
        heads[site.name] = (
            tuple(tuple(layer["kept_heads"]) for layer in pruned[site.name]) if pruned else (whole,) * count
        )
    return T5Recipe(
        norm_epsilon=config.layer_norm_epsilon,
        activation=config.dense_act_fn,
        head_scale=shape.hidden_size**-0.5 if config.scale_decoder_outputs else 1.0,
        max_distance=config.relative_attention_max_distance,
        kept_heads=heads,
    )


def build_encoder(shape: ModelShape, recipe: T5Recipe, weights: Weights) -> ir.Model:
    """Build the encoder: ``input_ids``, ``attention_mask`` [B, E] to ``last_hidden_state`` [B, E, D]."""
    stack = _Stack("encoder", shape, recipe, weights)
    op = stack.op
    sizes: list[int | str] = ["batch_size", "encoder_sequence_length"]
    tokens = stack.parts.ids("input_ids", sizes)
    valid = stack.parts.ids("attention_mask", sizes)
    hidden = stack.embedded(tokens)
    length = op.Squeeze(op.Shape(tokens, start=1, end=2))
    keys = op.Range(0, length, 1)
    bias = stack.position_bias("encoder", op.Unsqueeze(keys, [1]), keys)
    mask = op.Where(stack.seen(valid), bias, stack.lowest)  # [B, H, E, E]
    masks = _HeadMasks(stack, mask, shape.position_bias[1])
    for position, layer in stack.layers("encoder"):
        normed = stack.norm(hidden, stack.module(position, "input_norm"))
        query, key, value = (stack.heads(normed, position, name) for name in "qkv")
        kept = recipe.kept_heads["encoder"][shape.number(position)]
        attended = stack.attention(position, query, key, value, masks.of(kept))
        hidden = op.Add(hidden, attended)
        hidden = stack.feed_forward(position, layer, hidden)
        hidden.name = hidden_state_name(shape.number(position))
    states = stack.norm(hidden, shape.family.stack("encoder").final_norm)
    stack.parts.add_output(states, "last_hidden_state", [*sizes, shape.hidden_size])
    return stack.finish()


def build_cached_decoder(shape: ModelShape, recipe: T5Recipe, weights: Weights) -> ir.Model:
    """Build the decoder with caches of self- and cross-attention, for the first step and all later ones.

    Inputs ``encoder_attention_mask`` [B, E], ``input_ids`` [B, T], ``encoder_hidden_states`` [B, E, D], per
    layer ``past_key_values.{i}.decoder.key|value`` [B, K, S-T, d] and, of the cross-attention,
    ``past_key_values.{i}.encoder.key|value`` [B, K, 0 or E, d], and ``use_cache_branch`` [1] (bool), false
    while the past is empty. Outputs ``logits`` [B, T, V] and, per layer, ``present.{i}.decoder.key|value``
    [B, K, S, d] and ``present.{i}.encoder.key|value`` [B, K, E, d].
    """
    stack = _Stack(DECODER, shape, recipe, weights)
    op, E = stack.op, "encoder_sequence_length"
    encoder_valid = stack.parts.ids("encoder_attention_mask", ["batch_size", E])
    tokens = stack.parts.ids("input_ids", ["batch_size", "decoder_sequence_length"])
    states = stack.parts.activations("encoder_hidden_states", ["batch_size", E, shape.hidden_size])
    own, crossed = [], []
    for (position, _), (cross, _) in zip(stack.layers(DECODER), stack.layers("cross"), strict=True):
        own.append(stack.past(position, "decoder"))  # runtimes pass the caches in this order
        crossed.append(stack.past(cross, "encoder"))
    cached = stack.parts.builder.input("use_cache_branch", ir.DataType.BOOL, [1])

    hidden = stack.embedded(tokens)
    new = op.Shape(tokens, start=1, end=2)
    past = op.Shape(own[0][0], start=2, end=3)
    total = op.Add(past, new)
    keys = op.Range(0, op.Squeeze(total), 1)
    queries = op.Unsqueeze(op.Range(op.Squeeze(past), op.Squeeze(total), 1), [1])
    bias = stack.position_bias(DECODER, queries, keys)
    mask = op.Where(op.LessOrEqual(keys, queries), bias, stack.lowest)  # [1, H, T, S]
    masks = _HeadMasks(stack, mask, shape.position_bias[1])
    padding = op.Where(stack.seen(encoder_valid), stack.scalar("zero", 0.0), stack.lowest)
    cross_mask = op.Expand(padding, op.Concat([1, 1], new, [1], axis=0))  # [B, 1, T, E]
    taken = op.Mul(op.Shape(crossed[0][0], start=2, end=3), op.Cast(cached, to=ir.DataType.INT64))
    fresh = op.Slice(states, taken, [_TO_THE_END], [1])  # [B, E or 0, D]

    for (position, layer), (cross, _) in zip(stack.layers(DECODER), stack.layers("cross"), strict=True):
        number = shape.number(position)
        normed = stack.norm(hidden, stack.module(position, "input_norm"))
        key, value = (
            op.Concat(before, stack.heads(normed, position, name), axis=2)
            for before, name in zip(own[number], "kv", strict=True)
        )
        query = stack.heads(normed, position, "q")
        kept = recipe.kept_heads[DECODER][number]
        hidden = op.Add(hidden, stack.attention(position, query, key, value, masks.of(kept)))

        normed = stack.norm(hidden, stack.module(cross, "input_norm"))
        cross_key, cross_value = (
            op.Concat(before, stack.heads(fresh, cross, name), axis=2)
            for before, name in zip(crossed[number], "kv", strict=True)
        )
        query = stack.heads(normed, cross, "q")
        hidden = op.Add(hidden, stack.attention(cross, query, cross_key, cross_value, cross_mask))
        hidden = stack.feed_forward(position, layer, hidden)
        hidden.name = hidden_state_name(number)
        stack.present(position, "decoder", key, value)
        stack.present(cross, "encoder", cross_key, cross_value)

    logits = op.MatMul(stack.norm(hidden, shape.family.final_norm, factor=recipe.head_scale), stack.head())
    sizes: list[int | str] = ["batch_size", "decoder_sequence_length", shape.vocab_size]
    stack.parts.add_output(logits, "logits", sizes, first=True)
    return stack.finish()


def position_buckets(*, buckets: int, max_distance: int, bidirectional: bool) -> NDArray[np.int64]:
    """Bucket of every relative position (key - query) from -max_distance to max_distance, as transformers.

    Half of the buckets of a direction are for exact distances, the rest grow with the logarithm [T5, Mesh
    TensorFlow]; without ``bidirectional`` later keys share bucket 0.
    """
    relative = torch.arange(-max_distance, max_distance + 1)
    offset = torch.zeros_like(relative)
    if bidirectional:
        buckets //= 2
        offset = (relative > 0) * buckets
        distance = relative.abs()
    else:
        distance = (-relative).clamp(min=0)
    exact = buckets // 2
    share = torch.log(distance.clamp(min=1).float() / exact) / float(np.log(max_distance / exact))
    grown = exact + (share * (buckets - exact)).to(torch.int64)
    found = offset + torch.where(distance < exact, distance, grown.clamp(max=buckets - 1))
    return found.numpy().astype(np.int64)


class _HeadMasks:
    """The mask of all heads, and the parts of it that layers with fewer heads need, each made once."""

    def __init__(self, stack: _Stack, mask: ir.Value, heads: int) -> None:
        self._stack = stack
        self._masks = {tuple(range(heads)): mask}

    def of(self, kept: tuple[int, ...]) -> ir.Value:
        """[B or 1, K, T, S] for the ``kept`` heads."""
        if kept not in self._masks:
            whole = next(iter(self._masks.values()))
            self._masks[kept] = self._stack.op.Gather(whole, list(kept), axis=1)
        return self._masks[kept]


class _Stack:
    """One graph while it is being built: what encoder and decoder have in common."""

    def __init__(self, name: str, shape: ModelShape, recipe: T5Recipe, weights: Weights) -> None:
        self.parts = GraphParts(
            name,
            opset=_OPSET,
            dtype=weights.dtype,
            norm_epsilon=recipe.norm_epsilon,
            parameter=weights.narrow,
        )
        self.op = self.parts.op
        self.shape = shape
        self.recipe = recipe
        self.wide = weights.wide
        size = (shape.vocab_size, shape.hidden_size)
        self.embedding = self.parts.weight(f"{shape.family.embedding}.weight", size)
        # finite, so that a row of padding alone is not NaN
        self.lowest = self.scalar("lowest", torch.finfo(weights.dtype.torch).min)
        """Added to an attention logit that is not to count."""

    def layers(self, site: str) -> Iterator[tuple[int, LayerShape]]:
        """(position in the shape, dimensions) of the layers of ``site``."""
        return ((at, layer) for at, layer in enumerate(self.shape.layers) if layer.site == site)

    def module(self, position: int, role: str) -> str:
        """Checkpoint name of the module that plays ``role`` in a layer."""
        site, prefix = self.shape.place(position)
        return f"{prefix}.{getattr(site, role)}"

    def embedded(self, tokens: ir.Value) -> ir.Value:
        """[B, T] token ids to the residual stream [B, T, D], float32."""
        return self.widened(self.op.Gather(self.embedding, tokens, axis=0))

    def position_bias(self, site: str, queries: ir.Value, keys: ir.Value) -> ir.Value:
        """Bias [1, H, T, S] of all heads, for positions of queries [T, 1] and keys [S].

        Buckets are looked up in a list; distances beyond its end share the last bucket, so any length is
        legal.
        """
        op, (buckets, heads), limit = self.op, self.shape.position_bias, self.recipe.max_distance
        module = f"{self.shape.family.site(site).layer(0)}.{self.shape.family.site(site).position_bias}"
        table = self.parts.weight(f"{module}.weight", (buckets, heads))
        found = position_buckets(buckets=buckets, max_distance=limit, bidirectional=site == "encoder")
        distance = op.Min(op.Max(op.Sub(keys, queries), -limit), limit)
        bucket = op.Gather(self.parts.constant("position_buckets", found), op.Add(distance, limit))
        return op.Unsqueeze(op.Transpose(op.Gather(table, bucket, axis=0), perm=[2, 0, 1]), [0])

    def seen(self, valid: ir.Value) -> ir.Value:
        """Attention mask [B, E] of 0 and 1 as bool [B, 1, 1, E]."""
        return self.op.Unsqueeze(self.op.Cast(valid, to=ir.DataType.BOOL), [1, 2])

    def heads(self, x: ir.Value, position: int, role: str) -> ir.Value:
        """Project [B, T, D] by q, k or v and split: [B, K, T, d]."""
        count, d = self.shape.layers[position].kv_heads, self.shape.head_dim
        projected = self.linear(x, self.module(position, role), self.shape.hidden_size, count * d)
        return self.op.Transpose(self.op.Reshape(projected, [0, 0, count, d]), perm=[0, 2, 1, 3])

    def attention(
        self, position: int, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value
    ) -> ir.Value:
        """[B, K, T, d] over [B, K, S, d] with an additive mask, projected to [B, T, D], float32."""
        width = self.shape.layers[position].kv_heads * self.shape.head_dim
        mixed = self.op.Attention(query, key, value, mask, scale=1.0)
        joined = self.op.Reshape(self.op.Transpose(mixed, perm=[0, 2, 1, 3]), [0, 0, width])
        return self.widened(self.linear(joined, self.module(position, "o"), width, self.shape.hidden_size))

    def feed_forward(self, position: int, layer: LayerShape, hidden: ir.Value) -> ir.Value:
        """The residual stream [B, T, D] plus wo(act(wi(x))), or wo(act(wi_0(x)) * wi_1(x)) when gated."""
        op, D, F = self.op, self.shape.hidden_size, layer.ffn_width
        site, prefix = self.shape.place(position)
        normed = self.norm(hidden, self.module(position, "ffn_norm"))
        first, *others = (self.linear(normed, f"{prefix}.{row}", D, F) for row in site.ffn_rows)
        inner = self.activation(first)
        for other in others:
            inner = op.Mul(inner, other)
        down = f"{prefix}.{site.ffn_down}"
        if self.parts.dtype.name == "fp16":
            weight = self.wide_weight(f"{down}.weight", (F, D), transposed=True)
            return op.Add(hidden, op.MatMul(self.widened(inner), weight))
        return op.Add(hidden, self.widened(self.linear(inner, down, F, D)))

    def activation(self, x: ir.Value) -> ir.Value:
        op, name = self.op, self.recipe.activation
        if name == "relu":
            return op.Relu(x)
        if name.startswith("gelu"):
            return op.Gelu(x, approximate="tanh" if name == "gelu_new" else "none")
        return op.Mul(x, op.Sigmoid(x))

    def norm(self, x: ir.Value, module: str, *, factor: float = 1.0) -> ir.Value:
        """RMS norm of the residual stream, times ``factor``, in the dtype of the linears."""
        scale = self.wide_weight(f"{module}.weight", (self.shape.hidden_size,))
        normed = self.op.RMSNormalization(x, scale, axis=-1, epsilon=self.recipe.norm_epsilon)
        if factor != 1.0:
            normed = self.op.Mul(normed, self.parts.constant("head_scale", np.array(factor, np.float32)))
        return self.parts.cast(normed)

    def widened(self, x: ir.Value) -> ir.Value:
        """``x`` in float32."""
        return self.op.Cast(x, to=ir.DataType.FLOAT) if self.parts.dtype.half_precision else x

    def linear(self, x: ir.Value, module: str, inputs: int, outputs: int) -> ir.Value:
        """x W^T: no linear of a T5 has a bias."""
        return self.parts.linear(x, module, inputs, outputs, bias=False)

    def head(self) -> ir.Value:
        """The [D, V] matrix of the head: its own weight, or the embedding transposed when they are tied."""
        if self.shape.tied_embeddings:
            return self.op.Transpose(self.embedding, perm=[1, 0])
        size = (self.shape.hidden_size, self.shape.vocab_size)
        return self.parts.weight(f"{self.shape.family.head}.weight", size, transposed=True)

    def wide_weight(self, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> ir.Value:
        """An initializer that is float32 whatever the graph's dtype."""
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        value.const_value = self.wide(name, shape, transposed)
        self.parts.builder.graph.register_initializer(value)
        return value

    def scalar(self, name: str, number: float) -> ir.Value:
        """A constant of the graph's dtype."""
        array = as_array(torch.tensor(number, dtype=self.parts.dtype.torch))
        return self.parts.constant(name, array)

    def past(self, position: int, kind: str) -> tuple[ir.Value, ir.Value]:
        """Inputs for the cached keys and values of a layer, each [B, K, tokens, d]."""
        heads, d = self.shape.layers[position].kv_heads, self.shape.head_dim
        sizes: list[int | str] = ["batch_size", heads, f"past_{kind}_sequence_length", d]
        name = f"past_key_values.{self.shape.number(position)}.{kind}"
        key, value = (self.parts.activations(f"{name}.{part}", sizes) for part in ("key", "value"))
        return key, value

    def present(self, position: int, kind: str, key: ir.Value, value: ir.Value) -> None:
        """Outputs of the keys and values that the next step takes back."""
        heads, d = self.shape.layers[position].kv_heads, self.shape.head_dim
        tokens = "encoder_sequence_length" if kind == "encoder" else "total_decoder_sequence_length"
        name = f"present.{self.shape.number(position)}.{kind}"
        for part, tensor in (("key", key), ("value", value)):
            self.parts.add_output(tensor, f"{name}.{part}", ["batch_size", heads, tokens, d])

    def finish(self) -> ir.Model:
        """The model, which says of itself what it is."""
        return self.parts.finish({SCHEMA_KEY: str(GRAPH_SCHEMA), DTYPE_KEY: self.parts.dtype.name})
