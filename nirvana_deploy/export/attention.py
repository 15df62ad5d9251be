"""Attention with a KV cache, in the forms that runtimes want it: one class a flavor of the graph.

A form declares the inputs that tell tokens apart, keeps each layer's cache, and turns projected queries,
keys and values [B, T, H d] and [B, T, K d] into mixed values [B, T, H d]. Keys are cached after the rotary
embedding; every layer's K and d are static dimensions of its own cache.

Dimension letters as in ``model/shape.py``; B sequences of a batch, S past plus new tokens, C slots of a
cache of fixed length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.parts import GraphParts
from nirvana_deploy.export.streaming import as_array
from nirvana_deploy.model.family import LayerAttention
from nirvana_deploy.model.shape import LayerShape

_TURNED_MULTIPLE = 16


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding, as the checkpoint's config defines it."""

    inverse_frequencies: NDArray[np.float32]
    """[d/2], or fewer where a head is turned in part."""
    scaling: float = 1.0
    """Factor on cosine and sine (1 unless the rope type says otherwise)."""


@dataclass(frozen=True)
class Attentions:
    """How the layers of a decoder attend."""

    layers: tuple[LayerAttention, ...]
    rotaries: Mapping[str, Rotary]
    """Kind of a layer (``LayerAttention.kind``) -> its rotary embedding."""
    head_dim: int
    scale: float | None = None
    """Factor on products of queries and keys; None: 1 / sqrt(d)."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different windows of layers, None among them where one sees all."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))


@dataclass(frozen=True)
class HeadNorms:
    """Modules of the RMS norms over head_dim ahead of the rotary embedding (Qwen3), where there are any."""

    query: str | None
    key: str | None
    all_heads: bool = False
    """Each is over all heads together (OLMo 2)."""


class KvForm(Protocol):
    """One way to keep a KV cache and to attend to it."""

    tokens: ir.Value
    """``input_ids`` [B, T]."""

    def attend(
        self, index: int, layer: LayerShape, projected: Sequence[ir.Value], norms: HeadNorms
    ) -> ir.Value:
        """Query, key and value, [B, T, H d], [B, T, K d], [B, T, K d], to mixed values [B, T, H d].

        ``gqa`` takes one value with all three side by side too, where heads are not normed.
        """
        ...


class ConcatenatedCache:
    """``portable``: past and new are concatenated, standard operators of opset 23.

    The mask is an explicit boolean input of ``Attention`` (the alignment of ``is_causal`` differs between
    runtimes), which has a single output (the TensorRT parser takes no other).
    """

    def __init__(self, parts: GraphParts, attentions: Attentions) -> None:
        self._parts, self._attentions = parts, attentions
        self.tokens = parts.ids("input_ids", ["batch_size", "sequence_length"])
        valid = parts.ids("attention_mask", ["batch_size", "total_sequence_length"])
        positions = parts.ids("position_ids", ["batch_size", "sequence_length"])
        self._masks = self._seen(valid)
        self._angles = _angles(parts, positions, attentions)

    def _seen(self, valid: ir.Value) -> dict[int | None, ir.Value]:
        """Window -> boolean [B, 1, T, S]: key j is seen by query i when it is in it and not padding.

        A query always sees itself, so that padded rows have something to attend to: a row without any
        key would be NaN and spread through the values of later layers.
        """
        op = self._parts.op
        new = op.Shape(self.tokens, start=1, end=2)
        total = op.Shape(valid, start=1, end=2)
        keys = op.Range(0, op.Squeeze(total), 1)
        queries = op.Unsqueeze(op.Range(op.Squeeze(op.Sub(total, new)), op.Squeeze(total), 1), [1])
        not_padding = op.Unsqueeze(op.Cast(valid, to=ir.DataType.BOOL), [1, 2])
        seen = op.Or(not_padding, op.Equal(keys, queries))
        return _in_windows(
            self._parts, self._attentions, keys, queries, op.And(seen, op.LessOrEqual(keys, queries))
        )

    def attend(
        self, index: int, layer: LayerShape, projected: Sequence[ir.Value], norms: HeadNorms
    ) -> ir.Value:
        """See :class:`KvForm`."""
        parts, how = self._parts, self._attentions
        query, key, value = _rotated_heads(parts, how, index, layer, projected, norms, self._angles)
        key = self._extended(index, "key", layer, key)
        value = self._extended(index, "value", layer, value)
        return _mixed(parts, how, layer, query, key, value, self._masks[how.layers[index].window])

    def _extended(self, index: int, kind: str, layer: LayerShape, new: ir.Value) -> ir.Value:
        """Past and new keys or values, [B, K, S, d]; also a graph output."""
        K, d = layer.kv_heads, self._attentions.head_dim
        past = self._parts.activations(
            f"past_key_values.{index}.{kind}", ["batch_size", K, "past_sequence_length", d]
        )
        present = self._parts.op.Concat(past, new, axis=2)
        self._parts.add_output(
            present, f"present.{index}.{kind}", ["batch_size", K, "total_sequence_length", d]
        )
        return present


class GroupQueryCache:
    """``gqa``: ``GroupQueryAttention`` of ONNX Runtime, which rotates, extends the cache and attends.

    Past and present may be the same buffer of more slots than are used, and nothing is copied then. The
    operator takes row b's tokens to lie in slots 0 ... ``seqlens_k[b]``: sequences of a batch that differ in
    length must be padded on the **right** (``seqlens_k`` is the sum of their mask, minus 1). With padding on
    the left it would attend to the padding and forget the last tokens; the runner of this package moves rows
    before it calls, so its own interface stays padded on the left.

    Positions follow from the lengths, so there is no ``position_ids``; cosine and sine lie in tables of
    ``max_position_embeddings`` rows.
    """

    def __init__(self, parts: GraphParts, attentions: Attentions, *, max_positions: int) -> None:
        self._parts, self._attentions, self._positions = parts, attentions, max_positions
        for rotary in attentions.rotaries.values():
            _require_whole_turns(rotary)
        self._op = parts.contrib()
        self.tokens = parts.ids("input_ids", ["batch_size", "sequence_length"])
        valid = parts.ids("attention_mask", ["batch_size", "total_sequence_length"])
        op = parts.op
        last = op.Sub(op.ReduceSum(valid, [1], keepdims=0), [1])
        self._last = op.Cast(last, to=ir.DataType.INT32)  # [B]
        total = op.Squeeze(op.Shape(valid, start=1, end=2))
        self._total = op.Cast(total, to=ir.DataType.INT32)  # scalar
        self._tables = {
            kind: [
                parts.table(
                    ".".join(filter(None, ("rotary", kind, name))),
                    (max_positions, len(rotary.inverse_frequencies)),
                    self._table(of, rotary),
                )
                for name, of in (("cosine", torch.cos), ("sine", torch.sin))
            ]
            for kind, rotary in attentions.rotaries.items()
        }

    def _table(
        self, of: Callable[[torch.Tensor], torch.Tensor], rotary: Rotary
    ) -> Callable[[], NDArray[np.generic]]:
        def compute() -> NDArray[np.generic]:
            positions = torch.arange(self._positions, dtype=torch.float32)
            angles = torch.outer(positions, torch.from_numpy(rotary.inverse_frequencies))
            return as_array((of(angles) * rotary.scaling).to(self._parts.dtype.torch))

        return compute

    def attend(
        self, index: int, layer: LayerShape, projected: Sequence[ir.Value], norms: HeadNorms
    ) -> ir.Value:
        """See :class:`KvForm`."""
        parts, K, d = self._parts, layer.kv_heads, self._attentions.head_dim
        how, scale = self._attentions.layers[index], self._attentions.scale
        dimensions: list[int | str] = ["batch_size", K, "past_sequence_length", d]
        past = [parts.activations(f"past_key_values.{index}.{kind}", dimensions) for kind in ("key", "value")]
        inputs: tuple[ir.Value | None, ...] = (*projected, None, None)
        if len(projected) > 1:
            query, key, value = projected
            inputs = (
                self._normed(query, layer.query_heads, norms.query, norms.all_heads),
                self._normed(key, K, norms.key, norms.all_heads),
                value,
            )
        mixed, *present = self._op.GroupQueryAttention(
            *inputs,
            *past,
            self._last,
            self._total,
            *(self._tables[how.kind] if how.rotary else ()),
            num_heads=layer.query_heads,
            kv_num_heads=K,
            scale=1 / math.sqrt(d) if scale is None else scale,
            do_rotary=int(how.rotary),
            **({} if how.window is None else {"local_window_size": how.window}),
            _outputs=3,
        )
        for kind, cache in zip(("key", "value"), present, strict=True):
            parts.add_output(
                cache, f"present.{index}.{kind}", ["batch_size", K, "present_sequence_length", d]
            )
        return mixed

    def _normed(self, flat: ir.Value, count: int, norm: str | None, all_heads: bool) -> ir.Value:
        """[B, T, count d] with every head normalized, or all together, in the same shape."""
        if norm is None:
            return flat
        op, d = self._parts.op, self._attentions.head_dim
        if all_heads:
            return self._parts.norm(flat, norm, count * d)
        split = op.Reshape(flat, [0, 0, count, d])
        return op.Reshape(self._parts.norm(split, norm, d), [0, 0, count * d])


class StaticCache:
    """``static-cache``: a cache of C slots that is updated in place, for engines (opset 24).

    ``write_indices`` [B] is the number of tokens that each sequence has in its cache: its T new ones go to
    the slots from there on, and stand at those positions. Query i of row b sees the slots up to
    ``write_indices[b] + i``; what lies beyond is never read, so rows are padded on the **right**, and a
    longer or shorter row needs no mask of its own. Every ``present`` has the shape of its ``past`` and is
    meant to be the same memory: ``TensorScatter`` of rank 4 along axis 2 is TensorRT's in-place cache update.
    """

    def __init__(self, parts: GraphParts, attentions: Attentions, *, cache_tokens: int) -> None:
        self._parts, self._attentions, self._slots = parts, attentions, cache_tokens
        op = parts.op
        self.tokens = parts.ids("input_ids", ["batch_size", "sequence_length"])
        self._write_at = parts.ids("write_indices", ["batch_size"])
        new = op.Range(0, op.Squeeze(op.Shape(self.tokens, start=1, end=2)), 1)
        positions = op.Add(op.Unsqueeze(self._write_at, [1]), new)  # [B, T]
        self._angles = _angles(parts, positions, attentions)
        slots, at = op.Range(0, cache_tokens, 1), op.Unsqueeze(positions, [1, 3])
        # [B, 1, T, C] by window
        self._masks = _in_windows(parts, attentions, slots, at, op.LessOrEqual(slots, at))

    def attend(
        self, index: int, layer: LayerShape, projected: Sequence[ir.Value], norms: HeadNorms
    ) -> ir.Value:
        """See :class:`KvForm`."""
        parts, how = self._parts, self._attentions
        query, key, value = _rotated_heads(parts, how, index, layer, projected, norms, self._angles)
        key = self._updated(index, "key", layer, key)
        value = self._updated(index, "value", layer, value)
        return _mixed(parts, how, layer, query, key, value, self._masks[how.layers[index].window])

    def _updated(self, index: int, kind: str, layer: LayerShape, new: ir.Value) -> ir.Value:
        """The cache [B, K, C, d] with the new keys or values in their slots; also a graph output."""
        dimensions: list[int | str] = [
            "batch_size",
            layer.kv_heads,
            self._slots,
            self._attentions.head_dim,
        ]
        past = self._parts.activations(f"past_key_values.{index}.{kind}", dimensions)
        present = self._parts.op.TensorScatter(past, new, self._write_at, axis=2, mode="linear")
        self._parts.add_output(present, f"present.{index}.{kind}", dimensions)
        return present


def _require_whole_turns(rotary: Rotary) -> None:
    """Raise NirvanaError for a share of a head that GroupQueryAttention does not turn."""
    turned = 2 * len(rotary.inverse_frequencies)
    if turned % _TURNED_MULTIPLE:
        raise NirvanaError(
            f"{turned} elements of a head are turned; GroupQueryAttention turns multiples of "
            f"{_TURNED_MULTIPLE}.",
            hint="Export with --flavor portable.",
        )


def _in_windows(
    parts: GraphParts, attentions: Attentions, keys: ir.Value, queries: ir.Value, seen: ir.Value
) -> dict[int | None, ir.Value]:
    """Window -> what a layer with it sees of what is ``seen`` without; keys and queries are positions."""
    op = parts.op

    def within(window: int) -> ir.Value:
        return op.And(seen, op.Greater(keys, op.Sub(queries, window)))

    return {window: seen if window is None else within(window) for window in attentions.windows}


def _angles(
    parts: GraphParts, positions: ir.Value, attentions: Attentions
) -> dict[str, tuple[ir.Value, ir.Value]]:
    """Kind -> cosine and sine [B, T, d/2] of the angles at ``positions`` [B, T], rounded once from float32.

    Computed in the graph once per call rather than read from a table: the arithmetic of transformers, no
    limit on positions, and no megabytes.
    """
    op = parts.op
    column = op.Cast(op.Unsqueeze(positions, [2]), to=ir.DataType.FLOAT)
    found = {}
    for kind, rotary in attentions.rotaries.items():
        name = ".".join(filter(None, ("rotary", kind, "inverse_frequencies")))
        angles = op.Mul(column, parts.constant(name, rotary.inverse_frequencies))
        cosine, sine = op.Cos(angles), op.Sin(angles)
        if rotary.scaling != 1.0:
            cosine, sine = op.Mul(cosine, rotary.scaling), op.Mul(sine, rotary.scaling)
        found[kind] = parts.cast(cosine), parts.cast(sine)
    return found


def _rotated_heads(
    parts: GraphParts,
    attentions: Attentions,
    index: int,
    layer: LayerShape,
    projected: Sequence[ir.Value],
    norms: HeadNorms,
    angles: Mapping[str, tuple[ir.Value, ir.Value]],
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Query [B, H, T, d] and key [B, K, T, d] after norm and rotary embedding, value [B, K, T, d]."""
    op, d, how = parts.op, attentions.head_dim, attentions.layers[index]

    def heads(flat: ir.Value, count: int, norm: str | None = None) -> ir.Value:
        if norm and norms.all_heads:
            flat, norm = parts.norm(flat, norm, count * d), None
        split = op.Reshape(flat, [0, 0, count, d])
        normed = parts.norm(split, norm, d) if norm else split
        return op.Transpose(normed, perm=[0, 2, 1, 3])

    query, key, value = projected
    rotated = [heads(query, layer.query_heads, norms.query), heads(key, layer.kv_heads, norms.key)]
    if how.rotary:
        turned = 2 * len(attentions.rotaries[how.kind].inverse_frequencies)
        partly = {} if turned == d else {"rotary_embedding_dim": turned}
        rotated = [op.RotaryEmbedding(one, *angles[how.kind], **partly) for one in rotated]
    return rotated[0], rotated[1], heads(value, layer.kv_heads)


def _mixed(
    parts: GraphParts,
    attentions: Attentions,
    layer: LayerShape,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
) -> ir.Value:
    """softmax(q k^T scale) v over the keys that ``mask`` lets be seen, [B, T, H d].

    Without ``softmax_precision``, which the TensorRT parser refuses: see ``dtypes.py``.
    """
    op, scale = parts.op, attentions.scale
    mixed = op.Attention(query, key, value, mask, **({} if scale is None else {"scale": scale}))
    return op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [0, 0, layer.query_heads * attentions.head_dim])
