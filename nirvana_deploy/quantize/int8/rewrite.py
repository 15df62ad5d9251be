"""W8A8 as explicit Q/DQ, right for ONNX Runtime and TensorRT: activations per tensor, weights per channel.

Signed, zero points zero, values in [-127, 127]. Every linear has its own Q/DQ pair with its own scale: ONNX
Runtime fuses a MatMul into an integer kernel only where both DequantizeLinear outputs have one reader, and
merges pairs of equal inputs. Outlier channels [ours; after LLM.int8(), arXiv 2208.07339, fixed by
calibration] are computed in float beside it: x W = x_rest W_rest + x_out W_out, with the outliers' int8 rows
zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nirvana_deploy.quantize.graph.linears import Linear, OnnxGraph
from nirvana_deploy.quantize.int8.ranges import LEVELS
from nirvana_deploy.quantize.int8.spec import Int8Linear

SMALLEST_DIMENSION = 16
"""Linears with fewer inputs or outputs stay float: integer kernels gain nothing there."""


def quantize_weight(
    weight: NDArray[np.float32], *, scale_dtype: np.dtype[np.generic] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """W [K, N] to int8 [K, N] and scales [N] > 0, symmetric: W ~ q * scale. Overwrites ``weight``.

    The scales are representable in ``scale_dtype``, and the integers are those of the rounded scales.
    """
    dtype = np.dtype(np.float32 if scale_dtype is None else scale_dtype)
    absmax = np.maximum(weight.max(axis=0), -weight.min(axis=0))
    scale = positive_scale(absmax, dtype)
    np.divide(weight, scale, out=weight)
    np.rint(weight, out=weight)
    np.clip(weight, -LEVELS, LEVELS, out=weight)
    return weight.astype(np.int8), scale


def positive_scale(bound: NDArray[np.float32], dtype: np.dtype[np.generic]) -> NDArray[np.float32]:
    """bound / 127 as ``dtype`` can say it (values float32), never below its smallest normal number."""
    scale = np.maximum(bound.astype(np.float32) / LEVELS, _smallest_normal(dtype))
    return scale.astype(dtype).astype(np.float32)


def quantize_linear(graph: OnnxGraph, linear: Linear, decision: Int8Linear) -> None:
    """Let ``linear`` run in int8 as decided; its weight is quantized when it is written."""
    if decision.outliers:
        _add_outliers(graph, linear, decision.outliers)
    x = _activation(graph, linear, decision.bound)
    w = _weight(graph, linear, decision.outliers)
    linear.node.replace_input_with(0, x)
    linear.node.replace_input_with(1, w)


def part_relu_from_quantizers(graph: OnnxGraph) -> None:
    """Write max(x, 0) for every ReLU that a QuantizeLinear reads: the same values.

    ONNX Runtime takes MatMul, ReLU and QuantizeLinear together for an integer MatMul with integer output
    whose ReLU is the clipping, finds that it is not (the zero point is not the smallest integer) and leaves
    the MatMul in float.
    """
    zeros: dict[ir.DataType, ir.Value] = {}
    for node in list(graph.model.graph):
        result, x = node.outputs[0], node.inputs[0] if node.inputs else None
        readers = {reader.op_type for reader, _ in result.uses()}
        if node.op_type != "Relu" or "QuantizeLinear" not in readers or x is None:
            continue
        dtype = result.dtype or ir.DataType.FLOAT
        if dtype not in zeros:
            zeros[dtype] = graph.constant(f"zero_{dtype.name.lower()}", np.zeros((), dtype=dtype.numpy()))
        graph.insert_in_place_of(node, "Max", [x, zeros[dtype]])


def _add_outliers(graph: OnnxGraph, linear: Linear, outliers: Sequence[int]) -> None:
    """Add the ``outliers`` channels of the product, computed in float, to what the MatMul gives."""
    channels, name, rows = np.array(outliers, dtype=np.int64), f"{linear.name}.outlier", len(outliers)
    read = linear.read_weight
    dtype = linear.dtype.numpy()
    weight = graph.initializer(
        f"{name}_weight", linear.dtype, (rows, linear.N), lambda: read()[channels].astype(dtype)
    )
    x = graph.node(
        "Gather",
        [linear.x, graph.constant(f"{name}_channels", channels)],
        before=linear.node,
        name=f"{name}_inputs",
        attributes={"axis": -1},
        dtype=linear.dtype,
    )
    y = graph.node("MatMul", [x, weight], before=linear.node, name=f"{name}_product", dtype=linear.dtype)
    graph.insert_behind(linear, "Add", lambda rest: [rest, y], name=f"{name}_sum")


def _activation(graph: OnnxGraph, linear: Linear, bound: float) -> ir.Value:
    name, dtype = f"{linear.name}.input", linear.dtype.numpy()
    scale = positive_scale(np.array(bound, dtype=np.float32), dtype).astype(dtype)
    parameters = [
        graph.constant(f"{name}_scale", scale),
        graph.constant(f"{name}_zero_point", np.array(0, dtype=np.int8)),
    ]
    quantized = graph.node(
        "QuantizeLinear",
        [linear.x, *parameters],
        before=linear.node,
        name=f"{name}_quantized",
        dtype=ir.DataType.INT8,
    )
    return graph.node(
        "DequantizeLinear",
        [quantized, *parameters],
        before=linear.node,
        name=f"{name}_dequantized",
        dtype=linear.dtype,
    )


def _weight(graph: OnnxGraph, linear: Linear, outliers: Sequence[int]) -> ir.Value:
    name, dtype = f"{linear.name}.weight", linear.dtype
    quantized, scale = _streamed(linear, outliers)
    parameters = [
        graph.initializer(f"{name}_quantized", ir.DataType.INT8, (linear.K, linear.N), quantized),
        graph.initializer(f"{name}_scale", dtype, (linear.N,), scale),
        graph.constant(f"{name}_zero_point", np.zeros(linear.N, dtype=np.int8)),
    ]
    return graph.node(
        "DequantizeLinear",
        parameters,
        before=linear.node,
        name=f"{name}_dequantized",
        attributes={"axis": 1},
        dtype=dtype,
    )


def _streamed(
    linear: Linear, outliers: Sequence[int]
) -> tuple[Callable[[], NDArray[np.int8]], Callable[[], NDArray[np.generic]]]:
    """Readers of the integers, rows of outliers zero, and of the scales, kept once they are known."""
    known: list[NDArray[np.float32]] = []
    dtype = linear.dtype.numpy()

    def quantized() -> NDArray[np.int8]:
        weight = linear.read_weight()
        weight[list(outliers)] = 0.0
        integers, scale = quantize_weight(weight, scale_dtype=dtype)
        known[:] = [scale]
        return integers

    def scale() -> NDArray[np.generic]:
        if not known:
            quantized()
        return known[0].astype(dtype)

    return quantized, scale


def _smallest_normal(dtype: np.dtype[np.generic]) -> np.float32:
    return np.float32(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]
