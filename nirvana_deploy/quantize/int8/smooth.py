"""SmoothQuant, folded: x W = (x / s)(s W), activations divided by what makes them, no operator at run time.

Division goes into the weight of an RMS norm (q, k, v; gate, up; an untied head), columns of v (o), or columns
of up (down, where the activation is linear in it: act(gate) * up, or ReLU). Readers of one value, and query
heads of a KV group, share s. s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) [arXiv 2211.10438], rounded to a
power of two [ours], so that the folded graph computes the bits of the original.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nirvana_deploy.quantize.graph.linears import Linear, OnnxGraph

_LARGEST_EXPONENT = 12
"""Factors stay within 2^-12 ... 2^12, so that float16 graphs keep normal numbers."""
Vector = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Fold:
    """One vector s, where it is divided into and where it is multiplied into."""

    name: str
    """Of the first reader: the key of this fold in files."""
    readers: tuple[Linear, ...]
    """Linears that read the divided value; rows of their weights are multiplied."""
    writers: tuple[ir.Value, ...]
    """Initializers that are divided along their last axis: a norm's weight, or a linear's weight and bias."""
    position: NDArray[np.int64]
    """[K]: which entry of s [channels] belongs to channel j of the readers."""
    channels: int
    """Entries of s: K, or the channels of v where query heads share them."""

    def factors(self, alpha: float, x_absmax: Vector, w_absmax: Vector) -> Vector:
        """s [channels], powers of two, from channel maxima [K]; 1 where either is zero."""
        x, w = (self._shared(absmax) for absmax in (x_absmax, w_absmax))
        used = (x > 0) & (w > 0)
        exponent = np.zeros(self.channels)
        exponent[used] = alpha * np.log2(x[used]) - (1 - alpha) * np.log2(w[used])
        exponent = np.clip(np.rint(exponent), -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        return np.exp2(exponent).astype(np.float32)

    def of_readers(self, factors: Vector) -> Vector:
        """s for each channel [K] of the readers."""
        return factors[self.position]

    def _shared(self, absmax: Vector) -> NDArray[np.float64]:
        largest = np.zeros(self.channels)
        np.maximum.at(largest, self.position, absmax.astype(np.float64))
        return largest


def find_folds(graph: OnnxGraph) -> tuple[Fold, ...]:
    """Every place of ``graph`` where an activation can be divided for free, in the order of the graph."""
    return tuple(_folds(graph))


def weight_absmax(fold: Fold) -> Vector:
    """Largest |W_j| of each input channel [K] over all readers."""
    largest = np.zeros(len(fold.position), dtype=np.float32)
    for reader in fold.readers:
        weight = reader.read_weight()
        np.maximum(largest, np.maximum(weight.max(axis=1), -weight.min(axis=1)), out=largest)
    return largest


def apply_folds(graph: OnnxGraph, folds: Sequence[Fold], factors: Mapping[str, Vector]) -> None:
    """Rewrite the weights of ``graph`` (lazily) by the factors, given by fold name."""
    for fold in folds:
        if fold.name not in factors:
            continue
        s = factors[fold.name]
        if s.shape != (fold.channels,):
            raise ValueError(f"{fold.name}: {s.shape} factors for {fold.channels} channels")
        for writer in fold.writers:
            graph.rewrite(writer, partial(_divided, by=s))
        for reader in fold.readers:
            graph.rewrite(reader.weight, partial(_rows_multiplied, by=fold.of_readers(s)))


def _divided(array: NDArray[Any], *, by: Vector) -> NDArray[Any]:
    return np.asarray(array / by.astype(array.dtype))


def _rows_multiplied(array: NDArray[Any], *, by: Vector) -> NDArray[Any]:
    return np.asarray(array * by[:, None].astype(array.dtype))


def _folds(graph: OnnxGraph) -> Iterator[Fold]:
    linears = [linear for linear in graph.linears if not linear.transposed]  # a tied head stays as it is
    by_role = {(linear.site, linear.layer, linear.role): linear for linear in linears}
    by_value: dict[str, list[Linear]] = defaultdict(list)
    for linear in linears:
        by_value[str(linear.x.name)].append(linear)
    for readers in by_value.values():
        first, size = readers[0], readers[0].K
        position, channels = np.arange(size), size
        if (norm := _norm_weight(readers)) is not None:
            writers: tuple[ir.Value, ...] = (norm,)
        elif first.role == "o" and (v := by_role.get((first.site, first.layer, "v"))) is not None:
            head_dim = _head_dim(graph, v)
            if v.N != first.K and head_dim is None:
                continue
            position, channels = _shared_by_query_heads(first.K, v.N, head_dim or v.N), v.N
            writers = _rows(v)
        elif first.role == "down" and (up := by_role.get((first.site, first.layer, "up"))) is not None:
            if not _is_linear_in(first.x, up):
                continue
            writers = _rows(up)
        else:
            continue
        yield Fold(
            name=first.name,
            readers=tuple(readers),
            writers=writers,
            position=position,
            channels=channels,
        )


_NORM_WEIGHT_INPUT = {
    "RMSNormalization": 1,
    "SimplifiedLayerNormalization": 1,
    "SkipSimplifiedLayerNormalization": 2,
}


def _norm_weight(readers: Sequence[Linear]) -> ir.Value | None:
    """The weight of the norm that all of ``readers``, and nobody else, read."""
    value = readers[0].x
    if {node for node, _ in value.uses()} != {reader.node for reader in readers}:
        return None
    producer = value.producer()
    while producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        value = producer.inputs[0]
        if len(value.uses()) != 1:
            return None
        producer = value.producer()
    if producer is None or producer.op_type not in _NORM_WEIGHT_INPUT:
        return None
    weight = producer.inputs[_NORM_WEIGHT_INPUT[producer.op_type]]
    alone = weight is not None and weight.const_value is not None and len(weight.uses()) == 1
    return weight if alone and not value.is_graph_output() else None


def _rows(linear: Linear) -> tuple[ir.Value, ...]:
    """The weight [inputs, outputs] of a linear and, where it has one, its bias [outputs]."""
    bias = _bias(linear)
    return (linear.weight,) if bias is None else (linear.weight, bias)


def _bias(linear: Linear) -> ir.Value | None:
    readers = [node for node, _ in linear.node.outputs[0].uses()]
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    (node,) = readers
    for value in node.inputs:
        if value is not None and value.const_value is not None and value.name == f"{linear.name}.bias":
            return value
    return None


def _is_linear_in(x: ir.Value, up: Linear) -> bool:
    """Whether ``x`` is up's result times something else, or its ReLU."""
    result = up.node.outputs[0]
    if _bias(up) is not None:
        result = next(iter(result.uses())).node.outputs[0]
    producer = x.producer()
    while producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    if producer is None or producer.op_type not in ("Mul", "Relu"):
        return False
    readers = {node for node, _ in result.uses()}
    return readers == {producer} and list(producer.inputs).count(result) == 1


def _head_dim(graph: OnnxGraph, v: Linear) -> int | None:
    """d, from the static shape of the layer's cached values."""
    for value in graph.model.graph.inputs:
        name = value.name or ""
        if name.startswith(f"past_key_values.{v.layer}.") and name.endswith("value") and value.shape:
            size = value.shape[3]
            return size if isinstance(size, int) else None
    return None


def _shared_by_query_heads(inputs: int, outputs: int, head_dim: int) -> NDArray[np.int64]:
    """[H d]: the channel of v [K d] that channel j of o's input is mixed from."""
    if inputs == outputs:
        return np.arange(inputs)
    channel = np.arange(inputs)
    heads_per_group = inputs // outputs
    return channel // head_dim // heads_per_group * head_dim + channel % head_dim
