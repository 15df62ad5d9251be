"""Packed products of an exported graph as the linears that they stand for: what quantization decides about.

``gqa`` graphs compute q, k and v, or gate and up, by one product (``export/packed.py``). Smoothing,
sensitivity and rounding are told of single linears, so a graph is unpacked when it is opened, and packed
again once it is quantized (``packing.py``). The product of a linear is named as its module is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nirvana_deploy.export.packed import unpacked_names
from nirvana_deploy.quantize.graph.files import lazy_tensor, read_initializer, static_shape

_ATTENTION = "GroupQueryAttention"

Parts = Callable[[ir.Model, ir.Value, Sequence[str], Sequence[int]], Sequence[ir.Value]]
"""(model, a packed initializer, names of its parts, their sizes along the last axis) -> the parts."""


def unpack(model: ir.Model, parts: Parts) -> None:
    """Replace every packed product of ``model`` by one for each linear, on the ``parts`` of its weight.

    ``parts`` is :func:`lazy_parts` where the graph will be written, :func:`split_parts` where it is run from
    the file as it lies.
    """
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        module = (weight.name or "").removesuffix(".weight") if weight is not None else ""
        names = unpacked_names(module)
        if weight is not None and weight.const_value is not None and len(names) > 1:
            _unpack_product(model, node, weight, names, parts)


def lazy_parts(
    model: ir.Model, packed: ir.Value, names: Sequence[str], sizes: Sequence[int]
) -> list[ir.Value]:
    """Initializers of their own, which are read from the packed one when somebody asks for them."""
    ends = [0, *accumulate(sizes)]
    dtype, leading = packed.dtype or ir.DataType.FLOAT, static_shape(packed)[:-1]
    values = []
    for name, (start, end) in zip(names, pairwise(ends), strict=True):
        shape = (*leading, end - start)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        value.const_value = lazy_tensor(name, dtype, shape, partial(_columns, packed, start, end))
        model.graph.register_initializer(value)
        values.append(value)
    return values


def split_parts(
    model: ir.Model, packed: ir.Value, names: Sequence[str], sizes: Sequence[int]
) -> list[ir.Value]:
    """The results of a Split of the packed initializer, which a runtime computes when it loads the graph."""
    reader = next(iter(packed.uses())).node
    split = _split(model, packed, sizes)
    for value, name in zip(split.outputs, names, strict=True):
        value.name, value.type = name, packed.type
    model.graph.insert_before(reader, split)
    return list(split.outputs)


def _unpack_product(
    model: ir.Model, node: ir.Node, weight: ir.Value, names: Sequence[str], parts: Parts
) -> None:
    x, result, nodes = node.inputs[0], node.outputs[0], [node]
    bias = _packed_bias(result, names)
    if bias is not None:
        nodes.append(next(iter(result.uses())).node)
        result = nodes[-1].outputs[0]
    (reader, place), *others = result.uses()
    if others:
        raise ValueError(f"{node.name!r} stands for {', '.join(names)} and is read by more than one node")
    sizes = _sizes(reader, static_shape(weight)[1], len(names))
    weights = parts(model, weight, [f"{name}.weight" for name in names], sizes)
    results = [_product(model, node, [x, one], name) for one, name in zip(weights, names, strict=True)]
    if bias is not None:
        biases = parts(model, bias, [f"{name}.bias" for name in names], sizes)
        results = [
            _product(model, node, [one, other], f"{name}.biased", operator="Add")
            for one, other, name in zip(results, biases, names, strict=True)
        ]
    if reader.op_type == _ATTENTION:
        for index, value in enumerate(results):
            reader.replace_input_with(place + index, value)
    else:
        for value, part in zip(results, reader.outputs, strict=True):
            value.shape = part.shape
            ir.convenience.replace_all_uses_with(part, value)
        nodes.append(reader)
    for old in reversed(nodes):
        model.graph.remove(old, safe=True)
    for packed in (weight, bias):
        if packed is not None and packed.name and not packed.uses():
            del model.graph.initializers[packed.name]


def _packed_bias(result: ir.Value, names: Sequence[str]) -> ir.Value | None:
    """The packed bias that is added to the product before anything else reads it."""
    reader = next(iter(result.uses())).node
    values = reader.inputs if reader.op_type == "Add" else ()
    wanted = tuple(f"{name}.bias" for name in names)
    for value in values:
        if value is not None and value.const_value is not None:
            module = (value.name or "").removesuffix(".bias")
            if tuple(f"{name}.bias" for name in unpacked_names(module)) == wanted:
                return value
    return None


def _sizes(reader: ir.Node, width: int, count: int) -> list[int]:
    """How many outputs each linear has, by what reads them: a Split, or attention of so many heads."""
    if reader.op_type == _ATTENTION:
        query, group = (reader.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        head_dim = width // (query + 2 * group)
        return [query * head_dim, group * head_dim, group * head_dim]
    sizes = reader.inputs[1] if reader.op_type == "Split" and len(reader.inputs) > 1 else None
    if sizes is None or sizes.const_value is None or len(reader.outputs) != count:
        raise ValueError(f"{reader.name!r} reads a product of {count} linears and does not say their sizes")
    return [int(size) for size in read_initializer(sizes)]


def _product(
    model: ir.Model, before: ir.Node, inputs: Sequence[ir.Value | None], name: str, operator: str = "MatMul"
) -> ir.Value:
    node = ir.node(operator, inputs, name=name)
    value = node.outputs[0]
    value.name, value.type = name, before.outputs[0].type
    model.graph.insert_before(before, node)
    return value


def _split(model: ir.Model, packed: ir.Value, sizes: Sequence[int]) -> ir.Node:
    tensor = ir.Tensor(np.array(sizes, dtype=np.int64), name=f"{packed.name}.sizes")
    value = ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )
    model.graph.register_initializer(value)
    return ir.node(
        "Split", [packed, value], {"axis": -1}, num_outputs=len(sizes), name=f"{packed.name}.parts"
    )


def _columns(packed: ir.Value, start: int, end: int) -> NDArray[Any]:
    leading = (slice(None),) * (len(static_shape(packed)) - 1)
    return read_initializer(packed, (*leading, slice(start, end)))
