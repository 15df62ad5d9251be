"""A half-precision model computed in float32: how its graph and its stored weights are proved exactly.

ONNX Runtime's CPU has no bfloat16 arithmetic, and float16 arithmetic rounds after every operator, which hides
small mistakes. The twin is the same file with the same external data: weights are widened as they are read,
rotary angles, which every model rounds, are rounded, and everything between is float32. It must equal the
checkpoint rounded to the same type within float32's tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

_HALF = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def float32_twin(path: Path) -> onnx.ModelProto:
    """The model in ``path`` with float32 activations, its external data not loaded; changes no file."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    producers = {name: node for node in graph.node for name in node.output}
    for tensor in graph.initializer:
        if tensor.data_type in _HALF:
            nodes.append(_widening(f"{tensor.name}/stored", tensor.name))
            tensor.name = f"{tensor.name}/stored"
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if kind.elem_type in _HALF:
            kind.elem_type = onnx.TensorProto.FLOAT
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Cast" and node.attribute[0].i in _HALF:
            if _is_angle(node.input[0], producers):
                name = node.output[0]
                node.output[0] = f"{name}/rounded"
                nodes.append(_widening(node.output[0], name))
            else:
                node.attribute[0].i = onnx.TensorProto.FLOAT
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _is_angle(name: str, producers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a value is a cosine or sine, scaled or not."""
    node = producers.get(name)
    if node is not None and node.op_type == "Mul":
        return _is_angle(node.input[0], producers)
    return node is not None and node.op_type in ("Cos", "Sin")


def _widening(source: str, target: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], name=target, to=onnx.TensorProto.FLOAT)
