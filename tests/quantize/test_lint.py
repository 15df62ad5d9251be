"""The rules of TensorRT: a graph of ours breaks none, and each kind of damage is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders.lint import lint
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.refused import Finding

LINEAR = "model.layers.1.mlp.gate_proj"
Change = Callable[[onnx.GraphProto], None]


@pytest.fixture(scope="module")
def int8(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in int8."""
    folder = tmp_path_factory.mktemp("lint")
    onnx_from_checkpoint(Checkpoint.open(tiny_llama), folder / "onnx")
    tokens = np.random.default_rng(3).integers(3, 200, size=(2, 16))
    quantize_onnx(
        folder / "onnx", folder / "int8", Quantization(scheme="int8", smooth="none"), calibration=tokens
    )
    return folder / "int8"


def _findings(folder: Path) -> list[Finding]:
    """All but float32 attention, which every graph here has."""
    return [finding for finding in lint(folder) if finding.rule != "attention-precision"]


def _changed(int8: Path, out: Path, change: Change) -> list[Finding]:
    shutil.copytree(int8, out)
    model = onnx.load(out / "model.onnx")
    change(model.graph)
    (out / "model.onnx.data").unlink()
    onnx.save(model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return _findings(out)


def _node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name == f"{LINEAR}.{name}")


def _set(graph: onnx.GraphProto, name: str, array: NDArray[np.generic]) -> None:
    tensor = next(tensor for tensor in graph.initializer if tensor.name == f"{LINEAR}.{name}")
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _add(graph: onnx.GraphProto, name: str, array: NDArray[np.generic]) -> str:
    graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def _per_channel_activation(graph: onnx.GraphProto) -> None:
    _set(graph, "input_scale", np.full(48, 0.1, dtype=np.float32))
    _set(graph, "input_zero_point", np.zeros(48, dtype=np.int8))


def _scales_along_the_inputs(graph: onnx.GraphProto) -> None:
    _set(graph, "weight_scale", np.full(48, 0.1, dtype=np.float32))
    _set(graph, "weight_zero_point", np.zeros(48, dtype=np.int8))
    _node(graph, "weight_dequantized").attribute[0].i = 0


def _unsigned(graph: onnx.GraphProto) -> None:
    _set(graph, "input_zero_point", np.array(128, dtype=np.uint8))


def _zero_scale(graph: onnx.GraphProto) -> None:
    _set(graph, "weight_scale", np.zeros(40, dtype=np.float32))


def _other_scale(graph: onnx.GraphProto) -> None:
    node = _node(graph, "input_dequantized")
    node.input[1] = _add(graph, "other", np.array(0.5, dtype=np.float32))


def _computed_scale(graph: onnx.GraphProto) -> None:
    graph.node.insert(0, helper.make_node("Identity", [f"{LINEAR}.input_scale"], ["computed"]))
    _node(graph, "input_quantized").input[1] = "computed"


def _computed_zero_point(graph: onnx.GraphProto) -> None:
    graph.node.insert(0, helper.make_node("Identity", [f"{LINEAR}.input_zero_point"], ["computed"]))
    _node(graph, "input_quantized").input[2] = "computed"


def _shared(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == "model.layers.1.mlp.up_proj.input_dequantized":
                node.input[index] = f"{LINEAR}.input_dequantized"


def _contrib(graph: onnx.GraphProto) -> None:
    _node(graph, "input_quantized").domain = "com.microsoft"


def _integer_matmul(graph: onnx.GraphProto) -> None:
    graph.node.append(helper.make_node("MatMulInteger", ["a", "b"], ["c"], name="integer"))
    graph.input.extend(helper.make_tensor_value_info(x, TensorProto.INT8, [2, 2]) for x in "ab")


def _odd_blocks(graph: onnx.GraphProto) -> None:
    _set(graph, "weight_scale", np.full((2, 40), 0.1, dtype=np.float32))
    _set(graph, "weight_zero_point", np.zeros((2, 40), dtype=np.int8))
    node = _node(graph, "weight_dequantized")
    node.attribute[0].i = 0
    node.attribute.append(helper.make_attribute("block_size", 32))


def _two_outputs(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "Attention")
    node.output.append("present_key")
    graph.output.append(helper.make_tensor_value_info("present_key", TensorProto.FLOAT, None))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_per_channel_activation, {("activation-per-tensor", "wrong")}),
        (_scales_along_the_inputs, {("weight-axis", "wrong")}),
        (_unsigned, {("symmetric", "refused"), ("signed", "refused")}),
        (_zero_scale, {("positive-scale", "refused")}),
        (_other_scale, {("matching-pair", "wrong")}),
        (_computed_scale, {("constant-scale", "refused")}),
        (_computed_zero_point, {("constant-zero-point", "refused")}),
        (_shared, {("one-reader", "slow")}),
        (_contrib, {("standard-operators", "refused")}),
        (_integer_matmul, {("explicit-qdq", "refused")}),
        (_odd_blocks, {("whole-blocks", "wrong"), ("blocked-types", "refused")}),
        (_two_outputs, {("single-output-attention", "refused")}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_damage_is_named(
    int8: Path, tmp_path: Path, change: Change, expected: set[tuple[str, str]]
) -> None:
    findings = _changed(int8, tmp_path / "changed", change)
    assert {(finding.rule, finding.severity) for finding in findings} == expected
    for finding in findings:
        where = str(finding)
        assert where.startswith("model.onnx: ") and where.endswith(f"[{finding.rule}]")


def test_our_own_graph_breaks_no_rule_of_quantization(int8: Path) -> None:
    assert _findings(int8) == []
    assert {finding.rule for finding in lint(int8)} == {"attention-precision"}  # it is float32
