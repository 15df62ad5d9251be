"""ONNX files opened lazily: the graph, and the places of its tensors in the external data beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx_ir.serde import SerdeError

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.snapshot import lies_within
from nirvana_deploy.output.layout import (
    DECODER_FILE,
    ENCODER_FILE,
    MODEL_FILE,
    SCHEMA_KEY,
    is_seq2seq,
    require_schema,
)

Part = tuple[slice, ...]
"""Of an array, axis by axis; () is all of it."""


def read_initializer(value: ir.Value, part: Part = ()) -> NDArray[Any]:
    """An initializer's values in memory of their own; what was mapped of its file is unmapped again."""
    return read_tensor(value.const_value, part)


def read_tensor(tensor: ir.TensorProtocol | None, part: Part = ()) -> NDArray[Any]:
    """The values of a tensor, or that ``part`` of them, as :func:`read_initializer` gives them."""
    if tensor is None:
        raise ValueError("not an initializer")
    array = np.array(tensor.numpy()[part])
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def lazy_tensor(
    name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], NDArray[Any]]
) -> ir.LazyTensor:
    """A tensor that ``read`` computes each time it is asked for; its shape is checked."""

    def tensor() -> ir.TensorProtocol:
        array = read()
        if array.shape != shape:
            raise ValueError(f"{name}: the graph says {shape}, computed were {array.shape}")
        return ir.Tensor(np.ascontiguousarray(array), dtype=dtype, name=name)

    return ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name)


def static_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a value whose dimensions are all numbers."""
    if value.shape is None:
        raise ValueError(f"{value.name!r} has no shape")
    return tuple(value.shape.numpy())


@contextmanager
def graph_errors(path: Path) -> Iterator[None]:
    """Turn what onnx and onnx-ir say of the graph at ``path`` into a NirvanaError."""
    try:
        yield
    except (DecodeError, ValueError) as error:
        raise NirvanaError(f"{path} is not a valid ONNX model: {error}.") from error
    except SerdeError as error:  # whose text is the whole graph
        raise NirvanaError(f"{path} is not a valid ONNX model: a part of its graph is malformed.") from error


def load_model(path: Path) -> ir.Model:
    """The graph at ``path``, quantized or not; no weight is read.

    Raises NirvanaError when it is not ONNX or of a newer schema, or its external data is missing, too short
    or elsewhere.
    """
    if not path.is_file():
        raise NirvanaError(f"{path} does not exist.", hint="nirvana-deploy export CHECKPOINT --out DIR")
    with graph_errors(path):
        model = ir.load(path)
    require_schema(path, model.metadata_props.get(SCHEMA_KEY))
    _check_external_data(model, path)
    _follow_links(model, path)
    return model


def _externals(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value


class _Linked(ir.ExternalTensor):
    """Bytes in a file that has several names; onnx-ir looks at none of them where there is no base folder."""

    def __init__(self, tensor: ir.ExternalTensor, file: Path) -> None:
        super().__init__(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=str(tensor.name),
            base_dir="",
        )
        self._file = file

    @property
    def path(self) -> str:
        return str(self._file)


def _follow_links(model: ir.Model, path: Path) -> None:
    """Let tensors read through links, which onnx-ir refuses: it cannot know who made them.

    The hub's cache is made of symbolic ones; folders of one search share their files by hard ones. Where the
    files lie was checked before.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            file = path.parent / tensor.location
            if file.is_symlink() or file.stat().st_nlink > 1:
                value.const_value = _Linked(tensor, file.resolve())


def data_files(model: ir.Model) -> set[str]:
    """Names of the external-data files that the graph refers to."""
    return {str(tensor.location) for tensor in _externals(model)}


def opened_files(folder: Path) -> set[Path]:
    """What a runtime opens of an ONNX folder: its graphs, and the files of their initializers' data.

    Files that are missing are left out, and of a graph that is none, its data.
    """
    found = set()
    for name in (ENCODER_FILE, DECODER_FILE) if is_seq2seq(folder) else (MODEL_FILE,):
        found.add(folder / name)
        with suppress(NirvanaError, OSError), graph_errors(folder / name):
            graphs = ir.load(folder / name).graphs()
            tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
            found |= {folder / one.location for one in tensors if isinstance(one, ir.ExternalTensor)}
    return {path for path in found if path.is_file()}


def _check_external_data(model: ir.Model, path: Path) -> None:
    """Every external tensor lies within a file of the same folder."""
    for tensor in _externals(model):
        location = Path(tensor.location)
        data = path.parent / location
        if location.is_absolute() or not lies_within(data, path.parent):
            raise NirvanaError(f"{path} places {tensor.name!r} outside its folder: {str(location)!r}.")
        if tensor.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
            raise NirvanaError(
                f"{path} says that {tensor.name!r}, whose bytes are in {location}, is of type "
                f"{tensor.dtype.name}.",
                hint="Export it again.",
            )
        if tensor.length not in (None, tensor.nbytes):
            raise NirvanaError(
                f"{path} gives {tensor.name!r} of shape {list(tensor.shape)} {tensor.length} bytes, "
                f"not {tensor.nbytes}.",
                hint="Export it again.",
            )
        end = (tensor.offset or 0) + tensor.nbytes
        size = data.stat().st_size if data.is_file() else -1
        if size < end:
            state = "is not there" if size < 0 else f"ends at byte {size}"
            raise NirvanaError(
                f"{path} places {tensor.name!r} up to byte {end} of {location}, which {state}.",
                hint="Copy the folder again as a whole, or export it again.",
            )
