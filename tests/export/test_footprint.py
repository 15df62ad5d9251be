"""Bytes that a decode step reads, against sums over the checkpoint's own tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import pytest

from nirvana_deploy.export.footprint import Footprint, footprint_of
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
    table, weight, tokens = _table(), _table("weight", [[1, 2], [3, 4]]), _tokens()
    rows = ir.Node("", lookup, [table, tokens])
    product = ir.Node("", "MatMul", [rows.outputs[0], weight])
    found = _footprint_of(tmp_path, tokens, [rows, product], [table, weight])
    assert found.weight_bytes_per_step == 4 * 8  # four int64


def test_a_table_of_codes_in_another_shape_is_read_by_row_too(tmp_path: Path) -> None:
    codes, size, tokens = _table("codes"), _table("size", [100, 1]), _tokens()
    table = ir.Node("", "Reshape", [codes, size])
    rows = ir.Node("", "Gather", [table.outputs[0], tokens])
    assert _footprint_of(tmp_path, tokens, [table, rows], [codes, size]).weight_bytes_per_step == 0


def _table(name: str = "table", rows: Sequence[object] = ((1.0, 2.0),) * 50) -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(rows, name=name))


def _tokens() -> ir.Value:
    return ir.Value(name="tokens", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))


def _footprint_of(
    folder: Path, tokens: ir.Value, nodes: Sequence[ir.Node], initializers: Sequence[ir.Value]
) -> Footprint:
    """Of a graph whose output is that of the last of ``nodes``."""
    graph = ir.Graph(
        [tokens],
        nodes[-1].outputs,
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": 23},
        name="g",
    )
    ir.save(ir.Model(graph, ir_version=10), folder / "model.onnx")
    return footprint_of(folder)


def _product(dimensions: tuple[int, ...]) -> int:
    result = 1
    for size in dimensions:
        result *= size
    return result
