"""The decoder as an ONNX graph, built layer by layer from parts.

The graph is built, not traced: about twenty nodes a layer, named after the modules they come from, with each
layer's own dimensions and weights referred to by name. Quantization relies on the names that
:func:`build_decoder` gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.attention import (
    Attentions,
    ConcatenatedCache,
    GroupQueryCache,
    HeadNorms,
    KvForm,
    Rotary,
    StaticCache,
)
from nirvana_deploy.export.dtypes import Dtype
from nirvana_deploy.export.packed import packed_name
from nirvana_deploy.export.parts import OPSET, GraphParts
from nirvana_deploy.export.streaming import Parameter
from nirvana_deploy.model.family import Computation
from nirvana_deploy.model.shape import LayerShape, ModelShape
from nirvana_deploy.output.layout import CONTEXT_KEY, DTYPE_KEY, FLAVOR_KEY, GRAPH_SCHEMA, SCHEMA_KEY

FLAVORS = ("portable", "gqa", "static-cache")
"""How the KV cache is kept (``attention.py`` says what each takes and gives):

========================  ======================================  =======================================
``portable`` (opset 23)   past and new concatenated               ONNX Runtime, onnxruntime-genai, TensorRT
``gqa`` (opset 23)        com.microsoft.GroupQueryAttention       ONNX Runtime, onnxruntime-genai
``static-cache`` (24)     fixed length, updated in place          TensorRT, ONNX Runtime
========================  ======================================  =======================================
"""
_GQA_HEAD_DIM_MULTIPLE = 16


@dataclass(frozen=True)
class GraphOptions:
    """What a user can choose about a decoder's graph."""

    dtype: Dtype
    flavor: str = "portable"
    cache_tokens: int | None = None
    """C of ``static-cache``; None for the other flavors."""
    last_logits: bool = False
    """Logits of the last position only, [B, 1, V]: all that a prompt needs, where the prompts of a batch end
    together. A shorter one that is padded on the right (onnxruntime-genai does) ends before that position."""

    def __post_init__(self) -> None:
        if self.flavor not in FLAVORS:
            raise NirvanaError(f"Unknown flavor {self.flavor!r}; there are {', '.join(FLAVORS)}.")
        if self.flavor == "static-cache" and (self.cache_tokens is None or self.cache_tokens < 1):
            raise NirvanaError(
                f"The flavor static-cache needs the length of its cache, got {self.cache_tokens}.",
                hint="Pass --cache-length TOKENS, prompt and answer together.",
            )
        if self.flavor != "static-cache" and self.cache_tokens is not None:
            raise NirvanaError(f"A cache length was given, and the cache of {self.flavor} grows.")

    def require_fits(self, shape: ModelShape) -> None:
        """Raise NirvanaError for a model that these options are not for."""
        if len(shape.family.stacks) > 1 and (self.flavor != "portable" or self.last_logits):
            asked = f"the flavor {self.flavor}" if self.flavor != "portable" else "last logits only"
            raise NirvanaError(
                f"An encoder-decoder ({shape.family.name}) cannot be exported with {asked}: "
                "its attention has a relative position bias, and its decoder starts from one token.",
                hint="Export with --flavor portable and all logits.",
            )
        if self.flavor == "gqa" and shape.head_dim % _GQA_HEAD_DIM_MULTIPLE:
            raise NirvanaError(
                f"GroupQueryAttention rotates heads of a multiple of {_GQA_HEAD_DIM_MULTIPLE} numbers, "
                f"and head_dim is {shape.head_dim}.",
                hint="Export with --flavor portable.",
            )

    @property
    def opset(self) -> int:
        """Of the standard operators."""
        return 24 if self.flavor == "static-cache" else OPSET


def build_decoder(
    shape: ModelShape,
    options: GraphOptions,
    *,
    computation: Computation,
    rotaries: Mapping[str, Rotary],
    norm_epsilon: float,
    max_positions: int,
    parameter: Parameter,
) -> ir.Model:
    """Build the decoder with KV cache for ``shape``, with a rotary embedding for each kind of layer.

    Inputs ``input_ids`` [B, T] and, by flavor, ``attention_mask`` [B, S], ``position_ids`` [B, T] or
    ``write_indices`` [B] (all int64); per layer ``past_key_values.{i}.key|value``. Outputs ``logits``
    [B, T, V] (or [B, 1, V]) and ``present.{i}.key|value``. ``max_positions`` is the length of the rotary
    tables of ``gqa``.

    * A linear is a ``MatMul`` with the initializer ``<module>.weight`` [inputs, outputs], ``<module>`` as in
      the checkpoint; its bias, if any, is the initializer ``<module>.bias`` of the ``Add`` behind.
    * In ``gqa``, q, k and v are one such product, and gate and up another, named as ``packed.py`` says: at
      one token a product takes microseconds, and launching it is a good part of them.
    * The embedding is the initializer ``<embedding>.weight`` [V, D]; a tied head is its ``Transpose``, an
      untied one the linear ``<head>.weight`` [D, V].
    * The hidden state that leaves layer i is called ``hidden_states.i``.
    """
    parts = GraphParts(
        "decoder", opset=options.opset, dtype=options.dtype, norm_epsilon=norm_epsilon, parameter=parameter
    )
    attentions = Attentions(computation.layers, rotaries, shape.head_dim, computation.attention_scale)
    _Decoder(parts, shape, options, computation).build(attentions, max_positions)
    return parts.finish(
        {
            SCHEMA_KEY: str(GRAPH_SCHEMA),
            FLAVOR_KEY: options.flavor,
            DTYPE_KEY: options.dtype.name,
            CONTEXT_KEY: str(max_positions),
        }
    )


def hidden_state_name(layer: int) -> str:
    """Name of the value that leaves ``layer``, [B, T, D]; verification compares it."""
    return f"hidden_states.{layer}"


class _Decoder:
    """Holds what every part of the graph needs while it is being built."""

    def __init__(
        self, parts: GraphParts, shape: ModelShape, options: GraphOptions, computation: Computation
    ) -> None:
        self.parts = parts
        self.op = parts.op
        self.shape = shape
        self.options = options
        self.computation = computation

    def build(self, attentions: Attentions, max_positions: int) -> None:
        """Add all nodes, inputs and outputs to the graph."""
        op, shape, family = self.op, self.shape, self.shape.family
        form = self.kv_form(attentions, max_positions)
        embedding = self.parts.weight(f"{family.embedding}.weight", (shape.vocab_size, shape.hidden_size))
        scales = self.computation
        hidden = self.parts.scaled(op.Gather(embedding, form.tokens, axis=0), scales.embedding_scale)
        change = None
        for index, layer in enumerate(shape.layers):
            self.parts.builder.push_module(family.layer(index))
            hidden, change = self.layer(index, layer, hidden, change, form)
            self.parts.builder.pop_module()
        normed, _ = self.add_and_norm(hidden, change, family.final_norm, name=len(shape.layers) - 1)
        length: int | str = "sequence_length"
        if self.options.last_logits:
            normed, length = op.Slice(normed, [-1], [2**62], [1]), 1
        logits = self.parts.scaled(op.MatMul(normed, self.head(embedding)), scales.logits_scale)
        self.parts.add_output(logits, "logits", ["batch_size", length, shape.vocab_size], first=True)

    def kv_form(self, attentions: Attentions, max_positions: int) -> KvForm:
        """The form that the flavor asks for; declares the inputs of tokens."""
        if self.options.flavor == "gqa":
            return GroupQueryCache(self.parts, attentions, max_positions=max_positions)
        if self.options.cache_tokens is not None:
            return StaticCache(self.parts, attentions, cache_tokens=self.options.cache_tokens)
        return ConcatenatedCache(self.parts, attentions)

    def layer(
        self, index: int, layer: LayerShape, hidden: ir.Value, change: ir.Value | None, form: KvForm
    ) -> tuple[ir.Value, ir.Value]:
        """One layer with its own dimensions: (hidden, what is yet to be added to it), each [B, T, D]."""
        site, prefix = self.shape.place(index)
        named = partial(_module, prefix)
        normed, hidden = self.add_and_norm(hidden, change, named(site.input_norm), name=index - 1)
        change = self.change(self.attention(index, layer, normed, form), named(site.attention_post_norm))
        normed, hidden = self.add_and_norm(hidden, change, named(site.ffn_norm))
        return hidden, self.change(self.feed_forward(index, layer, normed), named(site.ffn_post_norm))

    def change(self, output: ir.Value, post_norm: str | None) -> ir.Value:
        """What an attention or an FFN adds to the hidden states, from its ``output`` [B, T, D]."""
        if post_norm is not None:
            output = self.parts.norm(output, post_norm, self.shape.hidden_size)
        return self.parts.scaled(output, self.computation.residual_scale)

    def add_and_norm(
        self, hidden: ir.Value, change: ir.Value | None, module: str | None, *, name: int | None = None
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of hidden + change, hidden + change); the sum leaves layer ``name``, when that is said.

        Without a norm's ``module`` both are the sum.
        """
        width = self.shape.hidden_size
        if change is None:
            return hidden if module is None else self.parts.norm(hidden, module, width), hidden
        if module is None:
            normed = total = self.op.Add(hidden, change)
        elif self.options.flavor == "gqa":
            normed, total = self.parts.fused_add_and_norm(hidden, change, module, width)
        else:
            total = self.op.Add(hidden, change)
            normed = self.parts.norm(total, module, width)
        if name is not None:
            total.name = hidden_state_name(name)
        return normed, total

    def attention(self, index: int, layer: LayerShape, hidden: ir.Value, form: KvForm) -> ir.Value:
        """Grouped-query attention over past and new tokens: [B, T, D] -> [B, T, D]."""
        D, d, bias = self.shape.hidden_size, self.shape.head_dim, self.shape.attention_bias
        site, prefix = self.shape.place(index)
        modules = [f"{prefix}.{module}" for module in (site.q, site.k, site.v)]
        sizes = [heads * d for heads in (layer.query_heads, layer.kv_heads, layer.kv_heads)]
        norms = HeadNorms(
            _module(prefix, site.q_norm), _module(prefix, site.k_norm), all_heads=site.norms_all_heads
        )
        projected = self.linears(hidden, modules, D, sizes, bias=bias, apart=bool(norms.query or norms.key))
        mixed = form.attend(index, layer, projected, norms)
        return self.parts.linear(
            mixed, f"{prefix}.{site.o}", layer.query_heads * d, D, bias=self.shape.output_bias
        )

    def feed_forward(self, index: int, layer: LayerShape, hidden: ir.Value) -> ir.Value:
        """Gated: down(act(gate(x)) * up(x)), [B, T, D] -> [B, T, D]."""
        D, F, bias = self.shape.hidden_size, layer.ffn_width, self.shape.ffn_bias
        site, prefix = self.shape.place(index)
        modules = [f"{prefix}.{row}" for row in site.ffn_rows]
        gate, up = self.linears(hidden, modules, D, [F, F], bias=bias)
        gated = self.op.Mul(self.activation(gate), up)
        return self.parts.linear(gated, f"{prefix}.{site.ffn_down}", F, D, bias=bias)

    def activation(self, gate: ir.Value) -> ir.Value:
        """What the FFN of the family applies to its gate."""
        if self.computation.activation == "gelu_tanh":
            return self.op.Gelu(gate, approximate="tanh")
        return self.op.Mul(gate, self.op.Sigmoid(gate))

    def linears(
        self,
        x: ir.Value,
        modules: Sequence[str],
        inputs: int,
        sizes: Sequence[int],
        *,
        bias: bool,
        apart: bool = True,
    ) -> Sequence[ir.Value]:
        """Linears of [B, T, inputs] to [B, T, size] each, or ``gqa``'s one value of all of them."""
        if self.options.flavor != "gqa":
            pairs = zip(modules, sizes, strict=True)
            return [self.parts.linear(x, module, inputs, size, bias=bias) for module, size in pairs]
        packed = self.parts.linear(x, packed_name(modules), inputs, sum(sizes), bias=bias)
        return self.op.Split(packed, list(sizes), axis=-1, _outputs=len(sizes)) if apart else [packed]

    def head(self, embedding: ir.Value) -> ir.Value:
        """The [D, V] matrix of the head: its own weight, or the embedding transposed when they are tied."""
        if self.shape.tied_embeddings:
            return self.op.Transpose(embedding, perm=[1, 0])
        size = (self.shape.hidden_size, self.shape.vocab_size)
        return self.parts.weight(f"{self.shape.family.head}.weight", size, transposed=True)


def _module(prefix: str, name: str | None) -> str | None:
    return None if name is None else f"{prefix}.{name}"
