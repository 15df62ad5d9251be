"""What a decode step reads, counted in the ONNX file itself, whatever its precision: bytes, not parameters.

A quantized linear stores codes, scales and perhaps zero points; some weights stay float; a tied embedding
is read whole by the head, an untied one by the row. The file knows all of it, so bounds of the benchmark
are counted here and not derived from a name such as "int8".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from nirvana_deploy.output.layout import DECODER_FILE, ENCODER_FILE, MODEL_FILE

_PAST = re.compile(r"past_key_values\.\d+\.(decoder\.)?(key|value)")
_CROSS_PAST = re.compile(r"past_key_values\.\d+\.encoder\.(key|value)")
_READ_ONCE = re.compile(r".*\.EncDecAttention\.(k|v|k\+v)\..*")
"""Weights of an encoder-decoder that only the first step multiplies."""
_BY_ROW = ("Gather", "GatherBlockQuantized", "GroupQueryAttention")
"""Operators that read the rows that they are asked for and not the table (the last one of angles)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that one decode step has to read."""

    weight_bytes_per_step: int
    """Every initializer once, except tables that are only looked up by row."""
    kv_cache_bytes_per_token: int
    """Keys and values that one token of one sequence adds, over all layers."""
    cross_cache_bytes_per_token: int = 0
    """Keys and values of the cross-attention that one prompt token takes, in an encoder-decoder."""
    weight_bytes_once: int = 0
    """Initializers that the prompt's pass alone reads: those of an encoder, and of cross keys and values."""


def footprint_of(folder: Path) -> Footprint:
    """Count the decoder in ``folder``; weights are not loaded."""
    path = folder / DECODER_FILE
    graph = ir.load(path if path.is_file() else folder / MODEL_FILE).graph
    weights = _weight_bytes(graph)
    once = sum(size for name, size in weights.items() if _READ_ONCE.fullmatch(name))
    encoder = folder / ENCODER_FILE
    if encoder.is_file():
        once += sum(_weight_bytes(ir.load(encoder).graph).values())
    return Footprint(
        weight_bytes_per_step=sum(size for name, size in weights.items() if not _READ_ONCE.fullmatch(name)),
        kv_cache_bytes_per_token=_cache_bytes(graph, _PAST),
        cross_cache_bytes_per_token=_cache_bytes(graph, _CROSS_PAST),
        weight_bytes_once=once,
    )


def _weight_bytes(graph: ir.Graph) -> dict[str, int]:
    """Bytes of each initializer that is read whole."""
    return {
        name: value.const_value.nbytes
        for name, value in graph.initializers.items()
        if value.const_value is not None and any(op not in _BY_ROW for op in _readers(value))
    }


def _cache_bytes(graph: ir.Graph, names: re.Pattern[str]) -> int:
    return sum(_bytes_per_token(value) for value in graph.inputs if names.fullmatch(value.name or ""))


def _bytes_per_token(cache: ir.Value) -> int:
    """Of a cache input [B, K, S, d]."""
    assert cache.shape is not None and cache.dtype is not None
    heads, head_dim = cache.shape[1], cache.shape[3]
    assert isinstance(heads, int) and isinstance(head_dim, int)  # static, as every runtime here needs it
    return int(heads * head_dim * cache.dtype.itemsize)


def _readers(value: ir.Value) -> Iterator[str]:
    """Operators that read ``value``, also as one of a subgraph."""
    for node, _ in value.uses():
        if node.op_type == "Reshape":  # a table of codes in another shape
            yield from (reader for output in node.outputs for reader in _readers(output))
        else:
            yield node.op_type
