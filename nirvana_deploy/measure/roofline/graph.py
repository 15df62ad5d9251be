"""The work of a model, counted in its ONNX files: products with stored matrices, and attentions.

Shapes inside a graph are not stored, so rows are followed from the graph's inputs: a value has as many rows
as the first input of its node that has any, and a concatenated cache those of its new part.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import onnx_ir as ir

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.footprint import footprint_of
from nirvana_deploy.measure.bounds import Mixing, Product, Rows, Work
from nirvana_deploy.output.layout import DECODER_FILE, ENCODER_FILE, MODEL_FILE

INTEGER = "integer"
"""Products of 8-bit integers: those of quantized activations, and what MatMulNBits makes of its blocks."""
_FLOATS = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}
_INTEGERS = (
    ir.DataType.INT4,
    ir.DataType.UINT4,
    ir.DataType.INT8,
    ir.DataType.UINT8,
)
_OF_A_MATRIX = ("Cast", "DequantizeLinear", "Transpose")
"""What may stand between a stored matrix and its product."""
_ROWS_OF_INPUTS: dict[str, Rows] = {"input_ids": "new", "encoder_hidden_states": "prompt"}
_INTEGER_ACCURACY = 4
"""accuracy_level of MatMulNBits at which activations are rounded to 8 bits too."""


def work_of(folder: Path, *, linear_parameters: int) -> Work:
    """Count an ONNX folder; weights are not loaded. ``linear_parameters`` are the model's, head left out.

    Raises NirvanaError for an attention whose heads the graph does not tell.
    """
    encoder = folder / ENCODER_FILE
    both = encoder.is_file()
    graphs = [_Counted(encoder, {"input_ids": "prompt"})] if both else []
    graphs.append(_Counted(folder / (DECODER_FILE if both else MODEL_FILE), _ROWS_OF_INPUTS))
    decoder = graphs[-1].graph
    return Work(
        linear_parameters=linear_parameters,
        footprint=footprint_of(folder),
        products=tuple(product for one in graphs for product in one.products),
        mixings=tuple(mixing for one in graphs for mixing in one.mixings),
        logit_bytes=_bytes_of_row(next(one for one in decoder.outputs if one.name == "logits")),
        encoder_decoder=both,
        rewrites_cache=any(_is_concatenated(one) for one in decoder.outputs),
    )


class _Counted:
    """One graph, walked once."""

    def __init__(self, path: Path, rows_of_inputs: dict[str, Rows]) -> None:
        self.graph = ir.load(path).graph
        self.products: list[Product] = []
        self.mixings: list[Mixing] = []
        self._path = path
        self._rows: dict[ir.Value, Rows] = {
            value: rows_of_inputs[value.name] for value in self.graph.inputs if value.name in rows_of_inputs
        }
        for node in self.graph:
            self._count(node)

    def _count(self, node: ir.Node) -> None:
        known = [rows for value in node.inputs if value is not None and (rows := self._rows.get(value))]
        if not known:
            return
        rows = known[-1] if node.op_type == "Concat" else known[0]
        if node.op_type == "Slice" and _keeps_the_last(node):
            rows = "last"
        for output in node.outputs:
            self._rows[output] = rows
        if node.op_type == "MatMulNBits":
            accuracy = _number(node, "accuracy_level", 0)
            arithmetic = INTEGER if accuracy == _INTEGER_ACCURACY else _float_of(node.inputs[2])
            self.products.append(Product(rows, _number(node, "K") * _number(node, "N"), arithmetic))
        elif node.op_type in ("MatMul", "Gemm") and (weight := _stored(node.inputs[1])) is not None:
            self.products.append(Product(rows, prod(weight.shape.numpy()), _arithmetic(node, weight)))
        elif node.op_type in ("Attention", "GroupQueryAttention"):
            self.mixings.append(self._mixing(node, rows))

    def _mixing(self, node: ir.Node, rows: Rows) -> Mixing:
        if node.op_type == "GroupQueryAttention":
            cache = node.inputs[3]
            width = _number(node, "num_heads") * _size(cache, 3)
            return Mixing(rows, rows, width, _FLOATS[_dtype(cache)])
        heads_width, key = _heads_width(node.inputs[0]), node.inputs[1]
        if heads_width is None or key is None:
            raise NirvanaError(
                f"{self._path} does not tell the heads of its attention {node.name!r}.",
                hint=f"Export it again: nirvana-deploy export CHECKPOINT --out {self._path.parent}",
            )
        return Mixing(rows, self._rows.get(key, rows), heads_width, _cache_arithmetic(self.graph))


def _sources(value: ir.Value | None) -> Iterator[ir.Value]:
    """``value``, and what it is made of, by the first input of each node."""
    while value is not None:
        yield value
        node = value.producer()
        value = node.inputs[0] if node is not None and node.inputs else None


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The matrix of the file behind a second factor, if it is one: transposed, dequantized or plain."""
    for one in _sources(value):
        if one.const_value is not None:
            return one.const_value
        node = one.producer()
        if node is None or node.op_type not in _OF_A_MATRIX:
            return None
    return None


def _arithmetic(node: ir.Node, weight: ir.TensorProtocol) -> str:
    """What a MatMul multiplies once ONNX Runtime has fused it with the DequantizeLinear in front of it."""
    if weight.dtype not in _INTEGERS:
        return _FLOATS.get(weight.dtype, "float32")  # float8 is widened
    behind = [_dequantizing(value) for value in node.inputs[:2]]
    in_blocks = behind[1] is not None and _number(behind[1], "block_size", 0) > 0
    if (behind[0] is not None and behind[1] is not None) or in_blocks:
        return INTEGER
    return "float32" if behind[1] is None else _float_of(behind[1].inputs[1])


def _dequantizing(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes ``value``, a Transpose between left aside."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose":
        return _dequantizing(node.inputs[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _heads_width(query: ir.Value | None) -> int | None:
    """H d of [B, H, T, d], from the Reshape that has split it."""
    for one in _sources(query):
        node = one.producer()
        if node is not None and node.op_type == "Reshape" and node.inputs[1] is not None:
            target = node.inputs[1].const_value
            sizes = [] if target is None else [int(size) for size in target.numpy()]
            return sizes[2] * sizes[3] if len(sizes) == 4 else None
    return None


def _keeps_the_last(node: ir.Node) -> bool:
    starts = node.inputs[1].const_value if node.inputs[1] is not None else None
    return starts is not None and [int(start) for start in starts.numpy()] == [-1]


def _is_concatenated(output: ir.Value) -> bool:
    """Whether a cache leaves the graph as a new, longer buffer."""
    node = output.producer()
    return (output.name or "").startswith("present.") and node is not None and node.op_type == "Concat"


def _cache_arithmetic(graph: ir.Graph) -> str:
    caches = (value for value in graph.inputs if (value.name or "").startswith("past_key_values."))
    first = next(caches, None) or graph.outputs[0]
    return _FLOATS.get(_dtype(first), "float32")


def _bytes_of_row(logits: ir.Value) -> int:
    return int(_size(logits, 2) * _dtype(logits).itemsize)


def _float_of(value: ir.Value | None) -> str:
    """The float type of a scale."""
    tensor = value.const_value if value is not None else None
    return "float32" if tensor is None else _FLOATS.get(tensor.dtype, "float32")


def _number(node: ir.Node, name: str, default: int | None = None) -> int:
    found = node.attributes.get(name)
    if found is None:
        assert default is not None, f"{node.op_type} has no {name}"
        return default
    return found.as_int()


def _dtype(value: ir.Value | None) -> ir.DataType:
    assert value is not None and value.dtype is not None
    return value.dtype


def _size(value: ir.Value | None, axis: int) -> int:
    assert value is not None and value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size
