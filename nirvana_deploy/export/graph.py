"""The decoder as an ONNX graph, built layer by layer: portable flavor, standard operators of opset 23.

The graph is built rather than traced: it has about twenty nodes a layer with names that say where they
come from, takes each layer's own dimensions, and refers to weights by name without holding them.

What makes it portable (one file for ONNX Runtime, onnxruntime-genai and the TensorRT parser):

* the KV cache is concatenated outside ``Attention``, which has a single output;
* the mask is an explicit boolean input of ``Attention``: no ``is_causal``, whose alignment differs
  between runtimes;
* every layer's KV heads and head_dim are static dimensions of its own cache inputs.

Rotary angles are computed from ``position_ids`` once per call instead of being read from a table of
``max_position_embeddings`` rows: the same arithmetic as transformers, no limit, and no megabytes.

Dimension letters as in ``model/shape.py``; B sequences of a batch, S past plus new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import GraphBuilder, OpBuilder

from nirvana_deploy.model.shape import LayerShape, ModelShape

OPSET = 23
IR_VERSION = 10  # the newest that every consumer reads
PRODUCER = "nirvana-deploy"

Parameter = Callable[[str, tuple[int, ...], bool], ir.TensorProtocol]
"""(checkpoint name, shape in the graph, transposed) -> tensor whose bytes are read when it is written."""


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding, as the checkpoint's config defines it."""

    inverse_frequencies: NDArray[np.float32]
    """[d/2]."""
    scaling: float = 1.0
    """Factor on cosine and sine (1 unless the rope type says otherwise)."""


def build_decoder(
    shape: ModelShape, *, rotary: Rotary, norm_epsilon: float, parameter: Parameter
) -> ir.Model:
    """Build the decoder with KV cache for ``shape``; float32.

    Inputs ``input_ids`` [B, T], ``attention_mask`` [B, S], ``position_ids`` [B, T] (int64) and per layer
    ``past_key_values.{i}.key|value`` [B, K, S-T, d]; outputs ``logits`` [B, T, V] and
    ``present.{i}.key|value`` [B, K, S, d]. Keys are cached after the rotary embedding.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="decoder")
    decoder = _Decoder(GraphBuilder(graph), shape, norm_epsilon, parameter)
    decoder.build(rotary)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name=PRODUCER)


def hidden_state_name(layer: int) -> str:
    """Name of the value that leaves ``layer``, [B, T, D]; verification compares it."""
    return f"hidden_states.{layer}"


class _Decoder:
    """Holds what every part of the graph needs while it is being built."""

    def __init__(
        self, builder: GraphBuilder, shape: ModelShape, norm_epsilon: float, parameter: Parameter
    ) -> None:
        self.builder = builder
        self.op: OpBuilder = builder.op
        self.shape = shape
        self.norm_epsilon = norm_epsilon
        self.parameter = parameter
        self.dtype = ir.DataType.FLOAT
        self.outputs: list[tuple[ir.Value, str, list[int | str]]] = []

    def build(self, rotary: Rotary) -> None:
        """Add all nodes, inputs and outputs to the graph."""
        op, family = self.op, self.shape.family
        tokens = self.builder.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        valid = self.builder.input(
            "attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"]
        )
        positions = self.builder.input("position_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])

        embedding = self.weight(f"{family.embedding}.weight", (self.shape.vocab_size, self.shape.hidden_size))
        hidden = op.Gather(embedding, tokens, axis=0)
        mask = self.attention_mask(tokens, valid)
        cosine, sine = self.rotary_angles(positions, rotary)
        for index, layer in enumerate(self.shape.layers):
            self.builder.push_module(family.layer(index))
            hidden = self.layer(index, layer, hidden, mask, cosine, sine)
            self.builder.pop_module()
        hidden = self.norm(hidden, family.final_norm)
        logits = op.MatMul(hidden, self.head(embedding))
        self.add_output(
            logits, "logits", ["batch_size", "sequence_length", self.shape.vocab_size], first=True
        )
        for value, name, dimensions in self.outputs:
            value.name, value.shape, value.dtype = name, ir.Shape(dimensions), self.dtype
            self.builder.graph.outputs.append(value)

    def attention_mask(self, tokens: ir.Value, valid: ir.Value) -> ir.Value:
        """Boolean [B, 1, T, S]: key j is seen by query i when it is not later and not padding.

        A query always sees itself, so that padded rows have something to attend to: a row without any
        key would be NaN and spread through the values of later layers.
        """
        op = self.op
        new = op.Shape(tokens, start=1, end=2)
        total = op.Shape(valid, start=1, end=2)
        keys = op.Range(0, op.Squeeze(total), 1)
        queries = op.Unsqueeze(op.Range(op.Squeeze(op.Sub(total, new)), op.Squeeze(total), 1), [1])
        not_padding = op.Unsqueeze(op.Cast(valid, to=ir.DataType.BOOL), [1, 2])
        seen = op.Or(not_padding, op.Equal(keys, queries))
        return op.And(seen, op.LessOrEqual(keys, queries))

    def rotary_angles(self, positions: ir.Value, rotary: Rotary) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine [B, T, d/2] of the angles at ``positions``."""
        op = self.op
        frequencies = self.constant("rotary.inverse_frequencies", rotary.inverse_frequencies)
        angles = op.Mul(op.Cast(op.Unsqueeze(positions, [2]), to=ir.DataType.FLOAT), frequencies)
        cosine, sine = op.Cos(angles), op.Sin(angles)
        if rotary.scaling != 1.0:
            cosine, sine = op.Mul(cosine, rotary.scaling), op.Mul(sine, rotary.scaling)
        return cosine, sine

    def layer(
        self,
        index: int,
        layer: LayerShape,
        hidden: ir.Value,
        mask: ir.Value,
        cosine: ir.Value,
        sine: ir.Value,
    ) -> ir.Value:
        """One decoder layer with its own dimensions: [B, T, D] -> [B, T, D]."""
        op, family = self.op, self.shape.family
        prefix = family.layer(index)
        normed = self.norm(hidden, f"{prefix}.{family.input_norm}")
        hidden = op.Add(hidden, self.attention(index, layer, normed, mask, cosine, sine))
        normed = self.norm(hidden, f"{prefix}.{family.ffn_norm}")
        hidden = op.Add(hidden, self.feed_forward(prefix, layer, normed))
        hidden.name = hidden_state_name(index)
        return hidden

    def attention(
        self,
        index: int,
        layer: LayerShape,
        hidden: ir.Value,
        mask: ir.Value,
        cosine: ir.Value,
        sine: ir.Value,
    ) -> ir.Value:
        """Grouped-query attention over past and new tokens: [B, T, D] -> [B, T, D]."""
        op, family, d = self.op, self.shape.family, self.shape.head_dim
        prefix, bias = family.layer(index), self.shape.attention_bias

        def heads(module: str, count: int) -> ir.Value:  # [B, count, T, d]
            projected = self.linear(
                hidden, f"{prefix}.{module}", self.shape.hidden_size, count * d, bias=bias
            )
            return op.Transpose(op.Reshape(projected, [0, 0, count, d]), perm=[0, 2, 1, 3])

        query = op.RotaryEmbedding(heads(family.q, layer.query_heads), cosine, sine)
        new_key = op.RotaryEmbedding(heads(family.k, layer.kv_heads), cosine, sine)
        key = self.cache(index, "key", layer, new_key)
        value = self.cache(index, "value", layer, heads(family.v, layer.kv_heads))
        mixed = op.Attention(query, key, value, mask)
        joined = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [0, 0, layer.query_heads * d])
        return self.linear(
            joined,
            f"{prefix}.{family.o}",
            layer.query_heads * d,
            self.shape.hidden_size,
            bias=self.shape.output_bias,
        )

    def cache(self, index: int, kind: str, layer: LayerShape, new: ir.Value) -> ir.Value:
        """Past and new keys or values, [B, K, S, d]; also a graph output."""
        K, d = layer.kv_heads, self.shape.head_dim
        past = self.builder.input(
            f"past_key_values.{index}.{kind}", self.dtype, ["batch_size", K, "past_sequence_length", d]
        )
        present = self.op.Concat(past, new, axis=2)
        self.add_output(present, f"present.{index}.{kind}", ["batch_size", K, "total_sequence_length", d])
        return present

    def feed_forward(self, prefix: str, layer: LayerShape, hidden: ir.Value) -> ir.Value:
        """Gated SiLU: down(silu(gate(x)) * up(x)), [B, T, D] -> [B, T, D]."""
        op, family, D, F = self.op, self.shape.family, self.shape.hidden_size, layer.ffn_width
        bias = self.shape.ffn_bias
        gate, up = (self.linear(hidden, f"{prefix}.{row}", D, F, bias=bias) for row in family.ffn_rows)
        gated = op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)
        return self.linear(gated, f"{prefix}.{family.ffn_down}", F, D, bias=bias)

    def linear(self, x: ir.Value, module: str, inputs: int, outputs: int, *, bias: bool) -> ir.Value:
        """x W^T (+ b); the weight is stored as [inputs, outputs], so that no runtime transposes it."""
        y = self.op.MatMul(x, self.weight(f"{module}.weight", (inputs, outputs), transposed=True))
        return self.op.Add(y, self.weight(f"{module}.bias", (outputs,))) if bias else y

    def norm(self, x: ir.Value, module: str) -> ir.Value:
        """RMS norm over the hidden width, accumulated in float32."""
        scale = self.weight(f"{module}.weight", (self.shape.hidden_size,))
        return self.op.RMSNormalization(x, scale, axis=-1, epsilon=self.norm_epsilon)

    def head(self, embedding: ir.Value) -> ir.Value:
        """The [D, V] matrix of the head: its own weight, or the embedding transposed when they are tied."""
        if self.shape.tied_embeddings:
            return self.op.Transpose(embedding, perm=[1, 0])
        size = (self.shape.hidden_size, self.shape.vocab_size)
        return self.weight(f"{self.shape.family.head}.weight", size, transposed=True)

    def weight(self, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> ir.Value:
        """An initializer named as in the checkpoint, whose bytes are read when the file is written."""
        value = ir.Value(name=name, type=ir.TensorType(self.dtype), shape=ir.Shape(shape))
        value.const_value = self.parameter(name, shape, transposed)
        self.builder.graph.register_initializer(value)
        return value

    def constant(self, name: str, array: NDArray[np.float32]) -> ir.Value:
        """A small initializer held in the graph file itself."""
        return self.builder.initializer(ir.Tensor(array, name=name), name, qualify=False)

    def add_output(
        self, value: ir.Value, name: str, dimensions: list[int | str], *, first: bool = False
    ) -> None:
        """Make ``value`` a graph output; consumers expect ``logits`` before the caches."""
        self.outputs.insert(0 if first else len(self.outputs), (value, name, dimensions))
