"""Bytes that a decode step reads, against sums over the checkpoint's own tensors."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from nirvana_deploy.export.footprint import footprint_of
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.weights import expected_shapes


def test_every_weight_once_and_the_embedding_only_where_the_head_reads_it(tiny: Path, tmp_path: Path) -> None:
    onnx_from_checkpoint(Checkpoint.open(tiny), tmp_path / "onnx")
    shape = Checkpoint.open(tiny).shape
    sizes = {name: _product(dimensions) for name, dimensions in expected_shapes(shape).items()}
    if not shape.tied_embeddings:
        del sizes["model.embed_tokens.weight"]
    found = footprint_of(tmp_path / "onnx")
    constants = found.weight_bytes_per_step - 4 * sum(sizes.values())
    assert 0 <= constants < 600  # rotary frequencies and the like
    assert found.kv_cache_bytes_per_token == shape.kv_cache_bytes_per_token(4)


@pytest.mark.parametrize("lookup", ["Gather", "GatherBlockQuantized"])
def test_a_table_read_by_row_is_not_counted(lookup: str, tmp_path: Path) -> None:
    table = ir.Value(name="table", const_value=ir.tensor([[1.0, 2.0]] * 50, name="table"))
    weight = ir.Value(name="weight", const_value=ir.tensor([[1, 2], [3, 4]], name="weight"))
    tokens = ir.Value(name="tokens", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    rows = ir.Node("", lookup, [table, tokens])
    product = ir.Node("", "MatMul", [rows.outputs[0], weight])
    graph = ir.Graph(
        [tokens],
        product.outputs,
        nodes=[rows, product],
        initializers=[table, weight],
        opset_imports={"": 23},
        name="g",
    )
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    assert footprint_of(tmp_path).weight_bytes_per_step == 4 * 8  # four int64


def _product(dimensions: tuple[int, ...]) -> int:
    result = 1
    for size in dimensions:
        result *= size
    return result


def test_a_table_of_codes_in_another_shape_is_read_by_row_too(tmp_path: Path) -> None:
    codes = ir.Value(name="codes", const_value=ir.tensor([[1, 2], [3, 4]], name="codes"))
    size = ir.Value(name="size", const_value=ir.tensor([4, 1], name="size"))
    tokens = ir.Value(name="tokens", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    table = ir.Node("", "Reshape", [codes, size])
    rows = ir.Node("", "Gather", [table.outputs[0], tokens])
    graph = ir.Graph(
        [tokens],
        rows.outputs,
        nodes=[table, rows],
        initializers=[codes, size],
        opset_imports={"": 23},
        name="g",
    )
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    assert footprint_of(tmp_path).weight_bytes_per_step == 0
