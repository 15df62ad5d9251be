"""What TensorRT asks of Q/DQ pairs, checked without TensorRT: the rules that graphs of this package keep.

Its parser refuses some of this late and with few words, and accepts some that it then computes otherwise
than ONNX says: per-channel scales of activations, scales along the inputs of a weight. Sources: NvInfer.h
(IQuantizeLayer, IDequantizeLayer) of TensorRT 10.12 to 11, and parses with TensorRT-RTX 1.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nirvana_deploy.quantize.graph.files import load_model, read_initializer
from nirvana_deploy.quantize.refused import Finding, Severity, refused_by_tensorrt

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_SIGNED = {ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1}
_BLOCKED = {ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1}
_HALVES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_REFUSED = {
    "ConvInteger",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
}
_Broken = Iterator[tuple[str, Severity, str]]


def lint(folder: Path) -> tuple[Finding, ...]:
    """Everything in the ``*.onnx`` of ``folder`` that TensorRT refuses or would compute otherwise."""
    of_pairs = (
        Finding(rule=rule, severity=severity, file=file.name, node=node.name or node.op_type, message=message)
        for file in sorted(folder.glob("*.onnx"))
        for node in load_model(file).graph
        if node.domain in ("", "ai.onnx")
        for rule, severity, message in _broken(node)
    )
    return (*refused_by_tensorrt(folder), *of_pairs)


def _broken(node: ir.Node) -> _Broken:
    if node.op_type in _REFUSED:
        yield "explicit-qdq", "refused", f"{node.op_type} is refused; int8 is said by Q/DQ pairs"
    elif node.op_type in (_Q, _DQ):
        yield from _quantizer(node)


def _quantizer(node: ir.Node) -> _Broken:
    data, scale = node.inputs[0], node.inputs[1]
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if data is None or scale is None:
        yield "complete", "refused", "data or scale is missing"
        return
    yield from _zero_point(zero_point)
    integer = _integer_type(node, data, zero_point)
    if integer is not None and integer not in _SIGNED:
        yield "signed", "refused", f"{integer.name} is refused; quantized values are signed"
    if scale.const_value is None:
        yield "constant-scale", "refused", "the scale is not a constant"
        return
    values = read_initializer(scale)
    if not (np.isfinite(values.astype(np.float64)).all() and (values > 0).all()):
        yield "positive-scale", "refused", "scales must be finite and positive"
    x = data if node.op_type == _Q else None
    if x is not None and scale.dtype in _HALVES and x.dtype is not None and x.dtype != scale.dtype:
        yield "scale-dtype", "refused", f"the scale is {scale.dtype}, the input {x.dtype}"
    yield from _granularity(node, data, values, integer)
    if node.op_type == _DQ and len(node.outputs[0].uses()) > 1:
        yield "one-reader", "slow", "several nodes read it: ONNX Runtime fuses none of them"
    yield from _pair(node, data)


def _zero_point(zero_point: ir.Value | None) -> _Broken:
    if zero_point is None:
        return
    if zero_point.const_value is None:
        yield "constant-zero-point", "refused", "the zero point is not a constant"
    elif read_initializer(zero_point).astype(np.int64).any():
        yield "symmetric", "refused", "a zero point that is not zero is refused"


def _granularity(node: ir.Node, data: ir.Value, scale: NDArray[Any], integer: ir.DataType | None) -> _Broken:
    weight = _rooted_at_constant(data)
    if scale.size == 1:
        return
    if not weight:
        yield (
            "activation-per-tensor",
            "wrong",
            f"an activation with {scale.size} scales; TensorRT quantizes activations per tensor",
        )
        return
    block = _attribute(node, "block_size")
    axis = _attribute(node, "axis", 1)
    shape = data.shape.numpy() if data.shape is not None and data.shape.is_static() else None
    if block:
        if integer is not None and integer not in _BLOCKED:
            yield (
                "blocked-types",
                "refused",
                f"blocks are for 4-bit and float8 weights, not {integer.name}",
            )
        if shape is not None and shape[axis] > block and shape[axis] % block:  # one short block is no guess
            yield (
                "whole-blocks",
                "wrong",
                f"{shape[axis]} inputs are no multiple of the block of {block}; TensorRT guesses another one",
            )
        return
    expected = _output_axis(node)
    if shape is not None and expected is not None and axis % len(shape) != expected % len(shape):
        yield (
            "weight-axis",
            "wrong",
            f"scales run along axis {axis} of the weight; the output channels are axis {expected}",
        )
    elif shape is not None and scale.shape != (shape[axis],):
        yield "weight-axis", "refused", f"{scale.shape} scales for {shape[axis]} output channels"


def _pair(node: ir.Node, data: ir.Value) -> _Broken:
    """A DequantizeLinear must undo the QuantizeLinear before it."""
    before = data.producer()
    if node.op_type != _DQ or before is None or before.op_type != _Q:
        return
    for index, name in ((1, "scale"), (2, "zero point")):
        one, other = (n.inputs[index] if len(n.inputs) > index else None for n in (before, node))
        if one is other or one is None or other is None:
            continue
        if one.const_value is None or other.const_value is None:
            continue
        if not np.array_equal(read_initializer(one), read_initializer(other)):
            yield "matching-pair", "wrong", f"its {name} is not that of the QuantizeLinear before it"


def _integer_type(node: ir.Node, data: ir.Value, zero_point: ir.Value | None) -> ir.DataType | None:
    if zero_point is not None:
        return zero_point.dtype if zero_point.const_value is None else zero_point.const_value.dtype
    if node.op_type == _DQ:
        return data.dtype
    said = _attribute(node, "output_dtype")
    return ir.DataType(said) if said else ir.DataType.UINT8  # what ONNX takes when nothing is said


def _rooted_at_constant(value: ir.Value) -> bool:
    producer = value.producer()
    while value.const_value is None and producer is not None and producer.op_type in (_Q, "Cast", "Reshape"):
        before = producer.inputs[0]
        if before is None:
            return False
        value, producer = before, before.producer()
    return value.const_value is not None


def _output_axis(node: ir.Node) -> int | None:
    """The axis of the output channels in the weight that ``node`` dequantizes, for the one that reads it."""
    transposed = False
    value = node.outputs[0]
    while True:
        readers = [
            reader for reader, index in value.uses() if index == 1 or reader.op_type in (_DQ, "Transpose")
        ]
        if len(readers) != 1:
            return None
        reader = readers[0]
        if reader.op_type == "Transpose":
            transposed = not transposed
        elif reader.op_type == "Gemm":
            return 0 if bool(_attribute(reader, "transB", 0)) != transposed else 1
        elif reader.op_type == "MatMul":
            return 0 if transposed else 1
        elif reader.op_type != _DQ:
            return None
        value = reader.outputs[0]


def _attribute(node: ir.Node, name: str, default: int = 0) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())
