"""One product for linears that read one value: q, k and v of an attention, gate and up of an FFN.

At batch 1, quantizing the activation and starting a parallel loop cost as much as a small product; side by
side along N they are paid once. Scales belong to output channels, so every result keeps its bits.
``GroupQueryAttention`` takes packed q, k and v as they are, elsewhere a ``Split`` hands out the parts. For
graphs that ONNX Runtime alone runs, as the last step of quantization; ``unpacking.py`` is the inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nirvana_deploy.export.packed import packed_name, parent_of
from nirvana_deploy.output.layout import FLAVOR_KEY
from nirvana_deploy.quantize.graph.files import read_initializer
from nirvana_deploy.quantize.graph.linears import Linear, OnnxGraph

_TOGETHER = (("q", "k", "v"), ("gate", "up"))
_ATTENTION = "GroupQueryAttention"


def is_for_ort_alone(graph: OnnxGraph) -> bool:
    """Whether ``graph`` is of the flavor that no other runtime reads, ``gqa``."""
    return graph.model.metadata_props.get(FLAVOR_KEY) == "gqa"


def siblings(
    linears: Sequence[Linear], *, alike: Callable[[Linear], Hashable] = lambda linear: None
) -> Iterator[tuple[Linear, ...]]:
    """``linears`` in order; those that can be one product together, the rest alone.

    Together are the q, k, v or the gate, up of one module that read the same value, have the same dtype and
    are ``alike``.
    """
    groups: dict[Hashable, list[Linear]] = {}
    for linear in linears:
        kind = next((kind for kind in _TOGETHER if linear.role in kind), None)
        key: Hashable = linear.name
        if kind is not None and not linear.transposed:
            key = (kind, parent_of(linear.name), id(linear.x), linear.dtype, alike(linear))
        groups.setdefault(key, []).append(linear)
    yield from map(tuple, groups.values())


def pack(graph: OnnxGraph, members: Sequence[Linear]) -> Linear:
    """The float ``graph`` with one linear in the place of ``members`` (of :func:`siblings`); returns it.

    Its weight [K, N1 + N2 + ...] lies side by side and is read when it is written; its name says what it
    holds (``names.unpacked_names``). Biases are added at once where every member has one.
    """
    if len(members) == 1:
        return members[0]
    first, name = members[0], packed_name([member.name for member in members])
    width = sum(member.N for member in members)
    weight = graph.initializer(
        f"{name}.weight", first.dtype, (first.K, width), partial(_side_by_side, members)
    )
    packed = ir.node("MatMul", [first.x, weight], name=f"{name}.float")
    nodes, results = [packed], [member.node.outputs[0] for member in members]
    adds = [_bias_add(member) for member in members]
    biases = [bias for add in adds if add is not None for bias in add.inputs if bias and bias.const_value]
    if len(biases) == len(members):
        bias = graph.initializer(f"{name}.bias", first.dtype, (width,), partial(_end_to_end, biases))
        nodes.append(ir.node("Add", [packed.outputs[0], bias], name=f"{name}.biased"))
        results = [add.outputs[0] for add in adds if add is not None]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(first.dtype)
    together, reader = nodes[-1].outputs[0], _attention_of(results)
    if reader is not None:
        for place, value in enumerate((together, None, None)):
            reader.replace_input_with(place, value)
    else:
        nodes.append(_parted(graph, name, together, results, [member.N for member in members]))
    graph.model.graph.insert_before(first.node, nodes)
    replaced = [result.producer() for result in results] + [member.node for member in members]
    for old in replaced:
        if old is not None and old.graph is not None:
            graph.model.graph.remove(old, safe=True)
    return replace(first, name=name, node=packed, weight=weight)


def pack_floats(graph: OnnxGraph, quantized: Collection[str]) -> None:
    """Put linears that stayed float together again; ``quantized`` are the names of those that did not."""
    for members in siblings([linear for linear in graph.linears if linear.name not in quantized]):
        pack(graph, members)


def _bias_add(linear: Linear) -> ir.Node | None:
    """The Add of a constant that alone reads the linear's result."""
    uses = list(linear.node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    constant = other is not None and other.const_value is not None and len(other.shape or ()) == 1
    return add if constant else None


def _attention_of(results: Sequence[ir.Value]) -> ir.Node | None:
    """The GroupQueryAttention that alone reads ``results``, as its query, key and value."""
    uses = [use for result in results for use in result.uses()]
    nodes = {use.node for use in uses}
    if [use.idx for use in uses] != [0, 1, 2] or len(nodes) != 1:
        return None
    (node,) = nodes
    return node if node.op_type == _ATTENTION else None


def _parted(
    graph: OnnxGraph, name: str, together: ir.Value, results: Sequence[ir.Value], sizes: Sequence[int]
) -> ir.Node:
    """A Split of ``together`` whose outputs take the place of ``results``."""
    parts = graph.constant(f"{name}.sizes", np.array(sizes, dtype=np.int64))
    node = ir.node("Split", [together, parts], {"axis": -1}, num_outputs=len(results), name=f"{name}.parts")
    for result, part in zip(results, node.outputs, strict=True):
        part.type, part.shape = result.type, result.shape
        ir.convenience.replace_all_uses_with(result, part)
        part.name, result.name = result.name, f"{result.name}.apart"
    return node


def _side_by_side(members: Sequence[Linear]) -> NDArray[np.generic]:
    dtype = members[0].dtype.numpy()
    return np.concatenate([member.read_weight().astype(dtype, copy=False) for member in members], axis=1)


def _end_to_end(biases: Sequence[ir.Value]) -> NDArray[np.generic]:
    return np.concatenate([read_initializer(bias) for bias in biases])
