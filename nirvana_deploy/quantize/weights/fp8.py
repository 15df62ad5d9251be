"""Weights in float8 (e4m3) behind DequantizeLinear: for GPUs from Ada on, whose products take them.

W [K, N] ~ codes * scale, one scale per output channel (axis 1), that puts the channel's largest weight on the
largest code, 448. Activations stay in half precision: no calibration. TensorRT-RTX compiles such a graph for
sm89 and newer, and refuses a list of targets that has an older one in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nirvana_deploy.base.progress import Progress
from nirvana_deploy.quantize.graph.linears import Linear, OnnxGraph
from nirvana_deploy.quantize.graph.names import HEAD
from nirvana_deploy.quantize.rewriting import QuantizeInputs, Rewritten

LARGEST_CODE = 448.0
_SMALLEST_DIMENSION = 16  # narrower linears gain nothing


def round_to_fp8(
    weight: NDArray[np.float32], scale_dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """W [K, N] to codes [K, N] (float8_e4m3fn, nearest, ties to even) and positive scales [N]."""
    smallest = float(ml_dtypes.finfo(scale_dtype).smallest_normal)  # type: ignore[no-untyped-call]
    scale = np.maximum(np.abs(weight).max(axis=0) / LARGEST_CODE, smallest).astype(scale_dtype)
    codes = np.clip(weight / scale.astype(np.float32), -LARGEST_CODE, LARGEST_CODE)
    return codes.astype(ml_dtypes.float8_e4m3fn), scale


def rewrite_fp8(
    graphs: Sequence[OnnxGraph], inputs: QuantizeInputs, *, scratch: Path, progress: Progress
) -> Rewritten:
    """Rewrite the linears of float ``graphs``, the head left out (a ``Rewrite``)."""
    rewritten = []
    for graph in graphs:
        for linear in graph.linears:
            if linear.role != HEAD and min(linear.K, linear.N) >= _SMALLEST_DIMENSION:
                _rewrite(graph, linear)
                rewritten.append(linear.name)
    return Rewritten(rewritten, {"linears": rewritten})


def _rewrite(graph: OnnxGraph, linear: Linear) -> None:
    read, dtype, name = linear.read_weight, linear.dtype.numpy(), f"{linear.name}.weight"
    parts = [
        graph.initializer(
            f"{name}_quantized",
            ir.DataType.FLOAT8E4M3FN,
            (linear.K, linear.N),
            lambda: round_to_fp8(read(), dtype)[0],
        ),
        graph.initializer(f"{name}_scale", linear.dtype, (linear.N,), lambda: round_to_fp8(read(), dtype)[1]),
    ]
    weight = graph.node(
        "DequantizeLinear",
        parts,
        before=linear.node,
        name=f"{name}_dequantized",
        attributes={"axis": 1},
        dtype=linear.dtype,
    )
    linear.node.replace_input_with(1, weight)
