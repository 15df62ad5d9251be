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

from nirvana_deploy.export import MODEL_FILE

_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")
_BY_ROW = ("Gather", "GatherBlockQuantized")
"""Operators that read the rows that they are asked for and not the table."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that one decode step has to read."""

    weight_bytes_per_step: int
    """Every initializer once, except tables that are only looked up by row."""
    kv_cache_bytes_per_token: int
    """Keys and values that one token of one sequence adds, over all layers."""


def footprint_of(folder: Path) -> Footprint:
    """Count the decoder in ``folder``; weights are not loaded."""
    graph = ir.load(folder / MODEL_FILE).graph
    weights = [
        value.const_value
        for value in graph.initializers.values()
        if value.const_value is not None and any(op not in _BY_ROW for op in _readers(value))
    ]
    return Footprint(
        weight_bytes_per_step=sum(weight.nbytes for weight in weights),
        kv_cache_bytes_per_token=sum(
            _bytes_per_token(value) for value in graph.inputs if _PAST.fullmatch(value.name or "")
        ),
    )


def _bytes_per_token(cache: ir.Value) -> int:
    """Of a cache input [B, K, S, d]."""
    assert cache.shape is not None and cache.dtype is not None
    heads, head_dim = cache.shape[1], cache.shape[3]
    assert isinstance(heads, int) and isinstance(head_dim, int)  # static, as every runtime here needs it
    return int(heads * head_dim * cache.dtype.itemsize)


def _readers(value: ir.Value) -> Iterator[str]:
    """Operators that read ``value``, also as one of a subgraph."""
    for node, _ in value.uses():
        yield node.op_type
