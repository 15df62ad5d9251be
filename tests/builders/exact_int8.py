"""Whether ONNX Runtime multiplies int8 exactly on this CPU."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper


@cache
def int8_error() -> float:
    """The largest error of an int8 product [4, 64] x [64, 32] in Q/DQ, whose exact values reach about 8.

    Kernels of CPUs without an integer dot product add pairs of products in 16 bits, which saturate.
    """
    random = np.random.default_rng(0)
    inputs, weights = (random.integers(-127, 128, size, dtype=np.int8) for size in ((4, 64), (64, 32)))
    scale, zero = np.float32(0.01), np.int8(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["v"]),
        helper.make_node("MatMul", ["d", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 32])],
        [
            numpy_helper.from_array(value, name)
            for name, value in (("scale", scale), ("zero", zero), ("w", weights))
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": inputs * scale})
    exact = (inputs.astype(np.int64) @ weights.astype(np.int64)) * float(scale) ** 2
    return float(np.abs(found - exact).max())


def require_exact_int8() -> None:
    """Skip the rest of a test, which compares numbers, where the kernels of this CPU saturate."""
    __tracebackhide__ = True
    if int8_error() > 1e-3:
        pytest.skip(
            f"ONNX Runtime's int8 kernels saturate on this CPU, which has no VNNI, AMX or Arm dot product: "
            f"a product is wrong by {int8_error():.1f}"
        )
