"""An ONNX file as the builder will see it: names, dimensions, operators, read without its weights.

What a TensorRT parser refuses is refused here first, by name and with the flavor that helps: its own message
names a node and an assertion. ``supports_operator`` of the parser is of no use for that: it says yes to
operators (``com.microsoft.GroupQueryAttention``) that the parse then fails on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.quantize.schemes import SCHEMES
from nirvana_deploy.runtime.beside import context_tokens

STANDARD_DOMAINS = ("", "ai.onnx")
_GRAPH_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
}
_NUMPY_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.BOOL: "bool",
}
_REFUSED = {
    "DynamicQuantizeLinear": "scales computed while running",
    "MatMulInteger": "an integer product without Q/DQ",
    "QLinearMatMul": "an integer product without Q/DQ",
}
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_FLAVORS = {
    "GroupQueryAttention": "--flavor portable, or --flavor static-cache for a cache updated in place",
    "MatMulNBits": "weights behind DequantizeLinear: build-engine --quantize w8 or w4 writes them so",
}

Dimension = int | str
"""A fixed size, or the name of one that varies."""


@dataclass(frozen=True)
class OnnxTensor:
    """One input or output of a graph."""

    name: str
    dtype: str
    """numpy's name."""
    dimensions: tuple[Dimension, ...]


@dataclass(frozen=True)
class OnnxSource:
    """What is said by an ONNX file, apart from the values of its weights."""

    path: Path
    inputs: tuple[OnnxTensor, ...]
    outputs: tuple[OnnxTensor, ...]
    dtype: str
    """``fp32``, ``fp16`` or ``bf16``: of the graph's first output."""
    operators: Mapping[str, int]
    """Nodes by operator; operators outside the standard with their domain, ``com.microsoft.X``."""
    attention_outputs: int
    """The most outputs that an Attention of the graph has."""
    initializers: Mapping[str, onnx.TensorProto]
    """Name -> header of the tensor; its values lie in the external data, or in it when it is small."""
    zero_points: frozenset[str]
    """Initializers that are zero points: the parser checks that they are zero and keeps none."""
    context_tokens: int | None
    """The longest sequence that the model was made for, where a config beside the file says it."""

    @property
    def kv(self) -> str:
        """``in-place``, ``concat`` or ``none``."""
        if "TensorScatter" in self.operators:
            return "in-place"
        return "concat" if any(one.name.startswith("past_key_values.") for one in self.inputs) else "none"

    @property
    def quantization(self) -> str | None:
        """Name of the scheme that its weights, and behind QuantizeLinear its activations, are stored in."""
        if "DequantizeLinear" not in self.operators:
            return None
        stored = {onnx.TensorProto.DataType.Name(one.data_type) for one in self.initializers.values()}
        rounds_activations = "QuantizeLinear" in self.operators
        found = [scheme for scheme in SCHEMES.values() if stored.intersection(scheme.stored_as)]
        found.sort(key=lambda scheme: (scheme.activation_bits is not None) != rounds_activations)
        return min(found, key=lambda scheme: scheme.weight_bits).name if found else None

    @property
    def data_files(self) -> tuple[Path, ...]:
        """The external-data files that initializers lie in."""
        names = {
            entry.value
            for tensor in self.initializers.values()
            for entry in tensor.external_data
            if entry.key == "location"
        }
        return tuple(self.path.parent / name for name in sorted(names))

    @property
    def bytes_on_disk(self) -> int:
        """Size of the graph and its external data."""
        return sum(file.stat().st_size for file in (self.path, *self.data_files))

    def sha256(self) -> dict[str, str]:
        """File name -> hex sha256, of the graph and its external data."""
        return {file.name: sha256_of(file) for file in (self.path, *self.data_files)}


def read_source(path: Path) -> OnnxSource:
    """Read an ONNX file without its weights.

    Raises NirvanaError when it is missing, not ONNX, its external data is not there, or its inputs have
    types or ranks that an engine cannot have.
    """
    if not path.is_file():
        folder = path.parent
        is_checkpoint = any(folder.glob("*.safetensors"))
        raise NirvanaError(
            f"{folder} holds no {path.name}{', it is a checkpoint' if is_checkpoint else ''}.",
            hint=f"nirvana-deploy export {folder} --out {folder}-onnx --dtype fp16"
            if is_checkpoint
            else f"nirvana-deploy export CHECKPOINT --out {folder} --dtype fp16",
        )
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise NirvanaError(f"{path} is not an ONNX file: {error}.") from error
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    outputs = tuple(_tensor(value, path) for value in graph.output)
    first = graph.output[0].type.tensor_type.elem_type if graph.output else 0
    source = OnnxSource(
        path=path,
        inputs=tuple(_tensor(value, path) for value in graph.input if value.name not in weights),
        outputs=outputs,
        dtype=_GRAPH_DTYPES.get(first, str(first)),
        operators=Counter(_operator(node) for node in graph.node),
        attention_outputs=max((len(n.output) for n in graph.node if n.op_type == "Attention"), default=0),
        initializers=weights,
        zero_points=frozenset(
            node.input[2] for node in graph.node if node.op_type in _QDQ and len(node.input) > 2
        ),
        context_tokens=context_tokens(path.parent),
    )
    missing = [file for file in source.data_files if not file.is_file()]
    if missing:
        raise NirvanaError(
            f"{path} keeps its weights in {missing[0].name}, which is not beside it.",
            hint="Copy both, or export it again: nirvana-deploy export CHECKPOINT --out DIR",
        )
    return source


def require_parsable(source: OnnxSource) -> None:
    """Raise NirvanaError, naming operators and what to export instead, for what the parser would refuse."""
    contributed = [name for name in source.operators if "." in name]
    if contributed:
        known = [remedy for name, remedy in _FLAVORS.items() if any(c.endswith(name) for c in contributed)]
        raise NirvanaError(
            f"{source.path} uses {', '.join(sorted(contributed))}: contrib operators of ONNX Runtime, "
            "which TensorRT has no plugin for.",
            hint=f"Export it with {' and with '.join(known)}." if known else "Export it from the checkpoint.",
        )
    for name, why in _REFUSED.items():
        if name in source.operators:
            raise NirvanaError(
                f"{source.path} uses {name} ({why}), which TensorRT does not take.",
                hint="Quantize it with explicit Q/DQ: nirvana-deploy build-engine DIR --quantize int8",
            )
    if source.attention_outputs > 1:
        raise NirvanaError(
            f"{source.path}: an Attention gives {source.attention_outputs} outputs, and TensorRT takes "
            "Attention with one alone.",
            hint="Keep the cache outside of Attention: nirvana-deploy export CHECKPOINT --flavor portable",
        )


def _operator(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"


def _tensor(value: onnx.ValueInfoProto, path: Path) -> OnnxTensor:
    of = value.type.tensor_type
    if of.elem_type not in _NUMPY_DTYPES:
        kind = onnx.TensorProto.DataType.Name(of.elem_type)
        raise NirvanaError(f"{path}: {value.name!r} has type {kind}, which an engine cannot read or write.")
    dimensions = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in of.shape.dim)
    return OnnxTensor(value.name, _NUMPY_DTYPES[of.elem_type], dimensions)
