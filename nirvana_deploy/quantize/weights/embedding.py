"""The embedding stored as codes, as the head is: rows are dequantized when they are looked up.

In float the embedding of a small model outweighs all that is left after quantization: of SmolLM2 in 4 bits
it is 113 of 200 MB. A tied embedding is the head's own matrix, whose codes and scales ``MatMulNBits`` has by
output channel, which is to say by row of the embedding: ``GatherBlockQuantized`` (com.microsoft) reads the
same bytes. An embedding of its own, or of a head in int8, whose product wants another layout, gets codes of
its own. TensorRT has no such lookup, so this is for graphs that ONNX Runtime alone runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from nirvana_deploy.quantize.graph.linears import Linear, OnnxGraph
from nirvana_deploy.quantize.graph.names import is_embedding
from nirvana_deploy.quantize.weights.rounding import RoundedWeight
from nirvana_deploy.quantize.weights.write import RowCodes, row_codes, stored_block


def embedding_of(graph: OnnxGraph) -> Linear | None:
    """The table of tokens that ``graph`` looks up in, as the linear [D, V] that it would be as a head.

    Its ``node`` is the lookup. None where there is none, or it is not in float.
    """
    for node in graph.model.graph:
        table = node.inputs[0] if node.op_type == "Gather" else None
        name = (table.name or "").removesuffix(".weight") if table is not None else ""
        if table is not None and table.const_value is not None and is_embedding(name):
            return Linear(
                name=name, role="embedding", site="", layer=None, node=node, weight=table, transposed=True
            )
    return None


def look_up_codes(
    graph: OnnxGraph,
    embedding: Linear,
    rows: dict[str, RowCodes],
    *,
    tied: Sequence[str] = (),
    rounded: Callable[[], RoundedWeight],
    bits: int,
    block_size: int,
) -> str:
    """Let ``embedding`` be looked up in codes, and say in whose: "codes of lm_head", or why it stays float.

    Those of a linear of ``tied``, where it has some in ``rows``, which are those of graphs that share a data
    file; or of the embedding itself, ``rounded`` when they are written. ``rows`` is told of them.
    """
    block = stored_block(embedding, bits=bits, block_size=block_size)
    if embedding.K % block:
        return f"float: rows of {embedding.K} numbers are no whole blocks of {block}"
    holder = next((name for name in (*tied, embedding.name) if name in rows), embedding.name)
    if holder not in rows:
        rows[holder] = row_codes(graph, embedding, rounded, bits=bits, block_size=block_size)
    rows[embedding.name] = rows[holder]
    _look_up(graph, embedding, rows[holder])
    return f"codes of {holder}"


def _look_up(graph: OnnxGraph, embedding: Linear, rows: RowCodes) -> None:
    held = [_held(graph, value) for value in (rows.codes, rows.scales)]
    width = embedding.K * rows.bits // 8
    size = graph.constant(f"{embedding.name}.table_size", np.array([embedding.N, width], dtype=np.int64))
    node, ids = embedding.node, embedding.node.inputs[1]
    assert ids is not None
    table = graph.node("Reshape", [held[0], size], before=node, name=f"{embedding.name}.table")
    looked_up = graph.node(
        "GatherBlockQuantized",
        [table, ids, held[1]],
        before=node,
        name=f"{embedding.name}.rows",
        domain="com.microsoft",
        attributes={
            "bits": rows.bits,
            "block_size": rows.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        },
        dtype=embedding.dtype,
    )
    graph.replace(embedding, looked_up)


def _held(graph: OnnxGraph, value: ir.Value) -> ir.Value:
    """``value``, or the initializer of its name in ``graph`` with the same tensor, which is stored once."""
    initializers = graph.model.graph.initializers
    if (found := initializers.get(str(value.name))) is not None:
        return found
    own = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=value.const_value)
    graph.model.graph.register_initializer(own)
    return own
