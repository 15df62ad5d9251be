"""An ONNX folder opened for rewriting: find its linears, replace what computes them, write it streamed.

A linear is a MatMul whose second input is an initializer ``<module>.weight`` [K, N], or the transpose of one
(a tied head). Weights stream: a graph holds names and places in files, new initializers are computed when
they are written, so peak memory is a few tensors. Rewrites stack: a linear read after
:meth:`OnnxGraph.rewrite` reads the changed weight.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from nirvana_deploy.base.artifact import whole_folder, write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.marker import CARD
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import disk_errors, require_free_bytes
from nirvana_deploy.output.layout import DATA_FILE
from nirvana_deploy.quantize.graph.files import (
    data_files,
    lazy_tensor,
    load_model,
    read_initializer,
    read_tensor,
    static_shape,
)
from nirvana_deploy.quantize.graph.names import described
from nirvana_deploy.quantize.graph.unpacking import lazy_parts, unpack

RECORD_FILE = "quantization.json"
"""What was decided, beside the graph that it was done to."""

_QUANTIZED_OPERATORS = frozenset(
    {
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QLinearMatMul",
        "QuantizeLinear",
    }
)
_ALIGNMENT_BYTES = 4096  # a page: runtimes can map large tensors straight from the file
_INLINE_BYTES = 256  # smaller tensors stay in the graph's own file


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear of a graph: y [..., N] = x [..., K] W [K, N]."""

    name: str
    """Module name as in the checkpoint, for example ``model.layers.3.mlp.down_proj``."""
    role: str
    """q, k, v, o, gate, up, down, head, or other when the name belongs to no known family."""
    site: str
    """Which kind of layer: ``decoder``, and in an encoder-decoder also ``encoder`` and ``cross``."""
    layer: int | None
    """Number within its site; None for the head and for unknown names."""
    node: ir.Node
    """The MatMul."""
    weight: ir.Value
    """The initializer: [K, N], or [N, K] when ``transposed``."""
    transposed: bool
    """A Transpose stands between the initializer and the MatMul, as for a tied head."""

    @property
    def K(self) -> int:  # noqa: N802 (a dimension letter)
        """Inputs: length of the sum."""
        return static_shape(self.weight)[1 if self.transposed else 0]

    @property
    def N(self) -> int:  # noqa: N802 (a dimension letter)
        """Outputs."""
        return static_shape(self.weight)[0 if self.transposed else 1]

    @property
    def x(self) -> ir.Value:
        """What the MatMul reads, [..., K]."""
        return _input(self.node, 0)

    @property
    def dtype(self) -> ir.DataType:
        """Element type of weight and activations: FLOAT, FLOAT16 or BFLOAT16."""
        return self.weight.dtype or ir.DataType.FLOAT

    def read_weight(self, outputs: slice = slice(None)) -> NDArray[np.float32]:
        """W [K, N], or these outputs of it, float32, in memory of its own; read anew at each call."""
        part = (outputs,) if self.transposed else (slice(None), outputs)
        array = read_initializer(self.weight, part).astype(np.float32, copy=False)
        return np.ascontiguousarray(array.T) if self.transposed else array


class OnnxGraph:
    """One ONNX file opened lazily: no weight is read until it is asked for or written.

    Mutable; the file is not changed. Raises NirvanaError when the file is not ONNX, its external data is
    missing, too short or outside its folder, it is quantized already, or it has no linear.
    """

    path: Path
    model: ir.Model
    linears: tuple[Linear, ...]
    """In the order of the graph. They stay valid while other linears are replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = load_model(path)
        _require_float(self.model, path)
        unpack(self.model, lazy_parts)
        self.linears = tuple(_find_linears(self.model))
        if not self.linears:
            raise NirvanaError(
                f"{path} has no linear to quantize: no MatMul reads a weight [K, N] of the graph.",
                hint="nirvana-deploy export CHECKPOINT --out DIR writes a graph with linears.",
            )

    def initializer(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], NDArray[Any]]
    ) -> ir.Value:
        """Add an initializer whose values ``read`` computes when the file is written (each time it is).

        4-bit types are given unpacked, in ``dtype.numpy()``.
        """
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        value.const_value = lazy_tensor(name, dtype, tuple(shape), read)
        self.model.graph.register_initializer(value)
        return value

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Add a small initializer, its values at hand."""
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def rewrite(self, initializer: ir.Value, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        """Change an initializer's values, shape and dtype kept; computed when it is read."""
        before, dtype = initializer.const_value, initializer.dtype or ir.DataType.FLOAT

        def read() -> NDArray[Any]:
            return change(read_tensor(before)).astype(dtype.numpy(), copy=False)

        initializer.const_value = lazy_tensor(initializer.name or "", dtype, static_shape(initializer), read)

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        *,
        before: ir.Node,
        name: str,
        domain: str = "",
        attributes: Mapping[str, Any] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """Insert a node with one output, which takes ``name`` too; ``dtype`` of the output where it is known.

        A ``domain`` that the file did not import yet is imported at version 1.
        """
        self.model.graph.opset_imports.setdefault(domain, 1)
        node = ir.node(operator, list(inputs), attributes or {}, domain=domain, name=name)
        output = node.outputs[0]
        output.name = name
        if dtype is not None:
            output.type = ir.TensorType(dtype)
        self.model.graph.insert_before(before, node)
        return output

    def replace(self, linear: Linear, output: ir.Value) -> None:
        """Let ``output`` take the place of the MatMul's result; a weight that nobody reads is not written."""
        before = linear.node.outputs[0]
        output.type, output.shape = before.type, before.shape
        name, is_output = before.name, before.is_graph_output()
        ir.convenience.replace_all_uses_with(before, output, replace_graph_outputs=True)
        if is_output:
            before.name = f"{linear.name}.float"
            output.name = name
        self.model.graph.remove(linear.node, safe=True)

    def untie(self, names: Collection[str]) -> None:
        """Give linears of ``names`` that read a transposed initializer (a tied head) a weight of their own.

        It is lazy: once the linear is quantized, nothing reads it and it is not written.
        """
        linears = list(self.linears)
        for index, linear in enumerate(linears):
            if not linear.transposed or linear.name not in names:
                continue
            own = self.initializer(
                f"{linear.name}.weight", linear.dtype, (linear.K, linear.N), partial(_in_dtype, linear)
            )
            linear.node.replace_input_with(1, own)
            linears[index] = replace(linear, weight=own, transposed=False)
        self.linears = tuple(linears)

    def insert_behind(
        self,
        linear: Linear,
        operator: str,
        inputs: Callable[[ir.Value], Sequence[ir.Value]],
        *,
        name: str,
    ) -> None:
        """Put a node between the MatMul and all that reads it; ``inputs`` are made of the MatMul's result."""
        result = linear.node.outputs[0]
        readers = list(result.uses())
        node = ir.node(operator, list(inputs(result)), name=name)
        changed = node.outputs[0]
        changed.name, changed.type, changed.shape = name, result.type, result.shape
        self.model.graph.insert_after(linear.node, node)
        for reader, index in readers:
            reader.replace_input_with(index, changed)
        for index, output in enumerate(self.model.graph.outputs):
            if output is result:
                self.model.graph.outputs[index] = changed
                changed.name, result.name = result.name, f"{name}_before"

    def insert_in_place_of(self, node: ir.Node, operator: str, inputs: Sequence[ir.Value]) -> None:
        """Compute the one output of ``node`` by another operator."""
        before = node.outputs[0]
        other = ir.node(operator, list(inputs), name=node.name)
        result = other.outputs[0]
        result.type, result.shape = before.type, before.shape
        self.model.graph.insert_before(node, other)
        ir.convenience.replace_all_uses_with(before, result)
        self.model.graph.remove(node, safe=True)
        result.name = before.name

    def drop_unused(self) -> None:
        """Remove nodes and initializers that nothing reads any more; :func:`write_folder` calls it."""
        RemoveUnusedNodesPass()(self.model)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all initializers as they would be written now."""
        return sum(_bytes(value) for value in self.model.graph.initializers.values())


def open_folder(folder: Path) -> tuple[OnnxGraph, ...]:
    """All graphs of an ONNX folder: one of a decoder, several of an encoder-decoder; sorted by file name."""
    files = sorted(folder.glob("*.onnx"))
    if not files:
        raise NirvanaError(
            f"{folder} holds no *.onnx file.", hint="nirvana-deploy export CHECKPOINT --out DIR"
        )
    return tuple(OnnxGraph(file) for file in files)


def write_folder(
    source: Path,
    out: Path,
    graphs: Sequence[OnnxGraph],
    *,
    records: Mapping[str, Any] | None = None,
    label: str = "Writing quantized weights",
    progress: Progress = SILENT,
) -> int:
    """Write ``graphs`` (of ``source``) to ``out``, with what else ``source`` holds, whole or not at all.

    Tokenizer, genai_config and the like are copied; ``records`` are JSON files to add, by name. Replaces
    what ``out`` held. All graphs share one data file, in which a tensor that they share lies once.
    Returns its bytes. Raises NirvanaError when ``out`` is
    ``source``, or the disk has no room.
    """
    if out.resolve() == source.resolve():
        raise NirvanaError(
            f"{out} cannot be written while it is read.", hint="Choose another folder with --out DIR."
        )
    skipped = {file for graph in graphs for file in data_files(graph.model)} | {RECORD_FILE, CARD}
    skipped |= {graph.path.name for graph in graphs}
    for graph in graphs:
        graph.drop_unused()
    holders = _stored_once(graphs)
    require_free_bytes(out, sum(_bytes(values[0]) for values in holders), what="The quantized folder")
    with whole_folder(out) as folder, progress.task(label, len(holders)) as advance:
        with disk_errors(folder), _external(holders, folder, advance):
            for graph in graphs:
                ir.save(graph.model, folder / graph.path.name)
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name not in skipped:
                shutil.copyfile(file, folder / file.name)
        for name, record in (records or {}).items():
            write_json(folder / name, record)
    return (out / DATA_FILE).stat().st_size


def _stored_once(graphs: Sequence[OnnxGraph]) -> list[list[ir.Value]]:
    """The initializers that go to the data file; those that share a place in the source's share one here."""
    holders: dict[Any, list[ir.Value]] = {}
    for graph in graphs:
        for value in graph.model.graph.initializers.values():
            tensor = value.const_value
            key: object = id(tensor)
            if isinstance(tensor, ir.ExternalTensor):  # a small one too: it names the source's file
                key = (str(tensor.location), tensor.offset)
            elif tensor is None or tensor.nbytes <= _INLINE_BYTES:
                continue
            holders.setdefault(key, []).append(value)
    return list(holders.values())


@contextmanager
def _external(
    holders: Sequence[Sequence[ir.Value]], folder: Path, advance: Callable[[int], None]
) -> Iterator[None]:
    """Write every tensor to the data file of ``folder``; inside the block the values refer to it."""
    before = [values[0].const_value for values in holders]
    stored = ir.external_data.convert_tensors_to_external(
        [tensor for tensor in before if tensor is not None],
        folder,
        DATA_FILE,
        alignment=_ALIGNMENT_BYTES,
        max_workers=1,
        callback=lambda tensor, info: advance(1),
    )
    _refer(holders, stored)
    try:
        yield
    finally:
        _refer(holders, before)


def _refer(holders: Sequence[Sequence[ir.Value]], tensors: Sequence[ir.TensorProtocol | None]) -> None:
    for values, tensor in zip(holders, tensors, strict=True):
        for value in values:
            value.const_value = tensor


def _in_dtype(linear: Linear) -> NDArray[Any]:
    return linear.read_weight().astype(linear.dtype.numpy(), copy=False)


def _bytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value is not None else 0


def _require_float(model: ir.Model, path: Path) -> None:
    for node in model.graph:
        if node.op_type in _QUANTIZED_OPERATORS:
            raise NirvanaError(
                f"{path} is quantized already: node {node.name!r} is a {node.op_type}.",
                hint="Quantize the float folder that it was made from.",
            )


def _find_linears(model: ir.Model) -> Iterator[Linear]:
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
            continue
        weight, transposed = _input(node, 1), False
        producer = weight.producer()
        if producer is not None and producer.op_type == "Transpose":
            weight, transposed = _input(producer, 0), True
        if weight.const_value is None or weight.shape is None or len(weight.shape) != 2:
            continue
        name, role, site, layer = described((weight.name or "").removesuffix(".weight"), transposed)
        yield Linear(
            name=name, role=role, site=site, layer=layer, node=node, weight=weight, transposed=transposed
        )


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"input {index} of {node.name!r} is missing")
    return value
