"""The parsed network against the graph, the plan and the weights: what can be proved without a GPU.

The builder computes what the network says, and every layer, dimension and constant of a network can be
read. Compared are inputs and outputs, the count of operators (:data:`COUNTED`), each attention with its
query heads, KV heads and head_dim, each linear with its module, and sampled weight values byte by byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import VerificationError
from nirvana_deploy.engine.source import OnnxSource, OnnxTensor
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import WeightSource

COUNTED = {
    "Attention": ("ATTENTION_INPUT", "ATTENTION_OUTPUT"),
    "RotaryEmbedding": ("ROTARY_EMBEDDING",),
    "TensorScatter": ("KV_CACHE_UPDATE",),
    "QuantizeLinear": ("QUANTIZE",),
    "DequantizeLinear": ("DEQUANTIZE",),
    "MatMul": ("MATRIX_MULTIPLY",),
}
"""ONNX operator -> the layer types that each of its nodes becomes exactly one of."""
_TRT_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}
_BITS = {"FLOAT": 32, "HALF": 16, "BF16": 16, "INT64": 64, "INT32": 32, "INT8": 8, "INT4": 4, "FP8": 8}
_THROUGH = ("CAST", "DEQUANTIZE", "QUANTIZE", "SHUFFLE", "UNSQUEEZE", "SQUEEZE")
"""Layers that stand between a weight and the product that reads it."""
_SAMPLES = 16
_LARGEST_BLOCK = 256


@dataclass(frozen=True)
class AttentionShape:
    """What one fused attention takes: q [B, H, T, d] and k [B, K, S, d]."""

    query_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class LinearShape:
    """One product with a constant."""

    weight: str
    """Name of the initializer."""
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Constant:
    """A constant of the network, which holds the builder's view of an initializer."""

    dtype: str
    """TensorRT's name."""
    size: int
    values: Callable[[], NDArray[Any] | None]
    """None where the bindings cannot hand the values out."""

    @property
    def stored_bytes(self) -> int:
        """Bytes that its values take."""
        return (self.size * _BITS.get(self.dtype, 8) + 7) // 8


@dataclass(frozen=True)
class NetworkFacts:
    """What a parsed network consists of."""

    inputs: tuple[OnnxTensor, ...]
    outputs: tuple[OnnxTensor, ...]
    layers: Mapping[str, int]
    attention: tuple[AttentionShape, ...]
    linears: tuple[LinearShape, ...]
    constants: Mapping[str, Constant]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all constants."""
        return sum(constant.stored_bytes for constant in self.constants.values())


@dataclass(frozen=True)
class NetworkCheck:
    """What was compared, once all of it agreed."""

    attentions: int
    linears: int
    compared_values: tuple[str, ...]
    """Weights whose bytes were compared with the ONNX file."""
    compared_with_checkpoint: tuple[str, ...]
    """Those that were also compared with the checkpoint."""


def read_network(trt: Any, network: Any) -> NetworkFacts:
    """Walk a parsed ``INetworkDefinition`` once."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(k).name: layer for layer in layers for k in range(layer.num_outputs)}
    kinds = [layer.type.name for layer in layers]
    return NetworkFacts(
        inputs=tuple(_described(network.get_input(k)) for k in range(network.num_inputs)),
        outputs=tuple(_described(network.get_output(k)) for k in range(network.num_outputs)),
        layers=dict(sorted(Counter(kinds).items())),
        attention=tuple(
            _attention(x) for x, kind in zip(layers, kinds, strict=True) if kind == "ATTENTION_INPUT"
        ),
        linears=tuple(_linears(layers, producers)),
        constants={
            x.name: _constant(trt, x) for x, kind in zip(layers, kinds, strict=True) if kind == "CONSTANT"
        },
    )


def check_network(
    facts: NetworkFacts,
    source: OnnxSource,
    *,
    shape: ModelShape | None = None,
    checkpoint: WeightSource | None = None,
) -> NetworkCheck:
    """Compare a parsed network with its graph and, where given, the model's shape and its weights.

    Raises VerificationError that lists what differs.
    """
    problems = [*_io_problems(facts, source), *_count_problems(facts, source)]
    if shape is not None:
        problems += _shape_problems(facts, shape)
    sampled = _sampled([name for name in source.initializers if name in facts.constants])
    unseen = [name for name in _weights(source) if name not in facts.constants]
    problems += [f"initializer {name} is not a constant of the network" for name in unseen[:3]]
    values, against = [], []
    for name in sampled:
        found, expected = facts.constants[name].values(), _initializer(source, name)
        if found is None:
            if facts.constants[name].size != expected.size:
                problems.append(f"{name} has {facts.constants[name].size} values, the file {expected.size}")
            continue
        if not np.array_equal(found.reshape(-1), expected.reshape(-1)):
            problems.append(f"the values of {name} are not those of {source.path.name}")
        values.append(name)
        if checkpoint is not None and name in checkpoint.names() and found.dtype.kind == "f":
            if not _same_as_checkpoint(found, checkpoint.load(name)):
                problems.append(f"the values of {name} are not those of the checkpoint")
            against.append(name)
    if problems:
        raise VerificationError(
            f"The network parsed from {source.path} is not the one that was exported: {'; '.join(problems)}."
        )
    return NetworkCheck(len(facts.attention), len(facts.linears), tuple(values), tuple(against))


def _io_problems(facts: NetworkFacts, source: OnnxSource) -> Iterator[str]:
    for side, found, wanted in (
        ("inputs", facts.inputs, source.inputs),
        ("outputs", facts.outputs, source.outputs),
    ):
        if [one.name for one in found] != [one.name for one in wanted]:
            yield f"{side} are {_few(one.name for one in found)}, not {_few(one.name for one in wanted)}"
            continue
        for has, should in zip(found, wanted, strict=True):
            sizes = tuple(d if isinstance(d, int) else "" for d in should.dimensions)
            known = all(h == s or not s for h, s in zip(has.dimensions, sizes, strict=False))
            if len(has.dimensions) != len(sizes) or not known or has.dtype != should.dtype:
                yield f"{has.name} is {has.dtype} {list(has.dimensions)}, not {should.dtype} {list(sizes)}"


def _count_problems(facts: NetworkFacts, source: OnnxSource) -> Iterator[str]:
    for operator, kinds in COUNTED.items():
        wanted = source.operators.get(operator, 0)
        for kind in kinds:
            found = facts.layers.get(kind, 0)
            if found != wanted:
                yield f"{found} layers {kind}, and {wanted} nodes {operator}"


def _shape_problems(facts: NetworkFacts, shape: ModelShape) -> Iterator[str]:
    """Attention and linears against a decoder's shape, layer by layer, in order."""
    wanted = [AttentionShape(x.query_heads, x.kv_heads, shape.head_dim) for x in shape.layers]
    for index, (found, should) in enumerate(zip(facts.attention, wanted, strict=False)):
        if found != should:
            yield f"attention {index} is {found}, not {should}"
    if len(facts.attention) != len(wanted):
        yield f"{len(facts.attention)} attentions for {len(wanted)} layers"
    linears = [one for one in facts.linears if ".outlier" not in one.weight]  # a part of an int8 linear
    modules = [one.weight.partition(".weight")[0] for one in linears]
    if not shape.tied_embeddings and shape.family.head not in modules:
        yield "the head is missing"
    planned = list(expected_linears(shape))
    if len(linears) < len(planned):
        yield f"{len(linears)} linears for {len(planned)}"
    for has, module, wants in zip(linears, modules, planned, strict=False):
        filled_up = has.inputs - wants.inputs  # a 4-bit weight is filled up to whole blocks
        fits = filled_up == 0 or (0 < filled_up < _LARGEST_BLOCK and has.weight.endswith("_quantized"))
        if module != wants.weight or has.outputs != wants.outputs or not fits:
            yield f"linear {has} is not {wants}"
            return


def expected_linears(shape: ModelShape) -> Iterator[LinearShape]:
    """The linears of a decoder in the order of its graph, by module (the head left out)."""
    D, d = shape.hidden_size, shape.head_dim
    for index, layer in enumerate(shape.layers):
        site, prefix = shape.place(index)
        sizes = [
            (site.q, D, layer.query_heads * d),
            (site.k, D, layer.kv_heads * d),
            (site.v, D, layer.kv_heads * d),
            (site.o, layer.query_heads * d, D),
            *((row, D, layer.ffn_width) for row in site.ffn_rows),
            (site.ffn_down, layer.ffn_width, D),
        ]
        yield from (LinearShape(f"{prefix}.{name}", inputs, outputs) for name, inputs, outputs in sizes)


def _described(tensor: Any) -> OnnxTensor:
    dimensions = tuple("" if size < 0 else int(size) for size in tensor.shape)
    dtype = tensor.dtype.name
    return OnnxTensor(tensor.name, _TRT_DTYPES.get(dtype, dtype.lower()), dimensions)


def _attention(layer: Any) -> AttentionShape:
    query, key = layer.get_input(0).shape, layer.get_input(1).shape
    return AttentionShape(int(query[1]), int(key[1]), int(query[3]))


def _linears(layers: Sequence[Any], producers: Mapping[str, Any]) -> Iterator[LinearShape]:
    """Products whose second factor is a constant, in order."""
    for layer in layers:
        if layer.type.name != "MATRIX_MULTIPLY":
            continue
        weight = producers.get(layer.get_input(1).name)
        while weight is not None and weight.type.name in _THROUGH:
            weight = producers.get(weight.get_input(0).name)
        if weight is not None and weight.type.name == "CONSTANT":
            inputs, outputs = (int(size) for size in tuple(layer.get_input(1).shape)[-2:])
            yield LinearShape(weight.name, inputs, outputs)


def _constant(trt: Any, layer: Any) -> Constant:
    # the bindings give a layer its own type only when it is asked for
    layer.__class__ = trt.IConstantLayer
    size = int(np.prod(tuple(layer.shape), dtype=np.int64))

    def values() -> NDArray[Any] | None:
        weights = layer.weights
        return weights if isinstance(weights, np.ndarray) else None

    return Constant(dtype=layer.get_output(0).dtype.name, size=size, values=values)


def _weights(source: OnnxSource) -> list[str]:
    """Initializers that lie in external data: the model's own weights."""
    stored = (name for name, tensor in source.initializers.items() if tensor.external_data)
    return [name for name in stored if name not in source.zero_points]


def _sampled(names: Sequence[str]) -> list[str]:
    """Some of ``names``, from the first to the last, at even distances."""
    if len(names) <= _SAMPLES:
        return list(names)
    return [names[round(k * (len(names) - 1) / (_SAMPLES - 1))] for k in range(_SAMPLES)]


def _initializer(source: OnnxSource, name: str) -> NDArray[Any]:
    """Values of one initializer of the ONNX file."""
    return onnx.numpy_helper.to_array(source.initializers[name], base_dir=str(source.path.parent))


def _same_as_checkpoint(found: NDArray[Any], tensor: torch.Tensor) -> bool:
    """Whether the constant is the checkpoint's tensor, rounded to its type, or the transpose of it."""
    expected = tensor.to(torch.from_numpy(found[:0].copy()).dtype).numpy()
    flat = found.reshape(-1)
    return np.array_equal(flat, expected.reshape(-1)) or np.array_equal(flat, expected.T.reshape(-1))


def _few(names: Iterator[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")
