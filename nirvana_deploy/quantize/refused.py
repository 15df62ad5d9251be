"""What TensorRT refuses of a quantized folder, for the record: contrib operators, other forms of attention.

A float graph may hold any of it. Q/DQ pairs are always this package's own, whose rules its tests check.
Sources: NvInfer.h (IAttention) of TensorRT 10.12 to 11, and parses with TensorRT-RTX 1.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from nirvana_deploy.quantize.graph.files import load_model

Severity = Literal["refused", "wrong", "slow"]


@dataclass(frozen=True)
class Finding:
    """One rule that a graph breaks."""

    rule: str
    """For example ``single-output-attention``."""
    severity: Severity
    """"refused": TensorRT does not take the graph; "wrong": it takes it and computes something else;
    "slow": it computes the right thing in float."""
    file: str
    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.node}: {self.message} [{self.rule}]"


def refused_by_tensorrt(folder: Path) -> tuple[Finding, ...]:
    """What TensorRT refuses of the ``*.onnx`` of ``folder``; no finding does not promise that it builds."""
    return tuple(
        Finding(rule=rule, severity="refused", file=file.name, node=node.name or node.op_type, message=text)
        for file in sorted(folder.glob("*.onnx"))
        for node in load_model(file).graph
        for rule, text in _broken(node)
    )


def _broken(node: ir.Node) -> Iterator[tuple[str, str]]:
    """(rule, message) of each rule that ``node`` breaks."""
    if node.domain not in ("", "ai.onnx"):
        yield "standard-operators", f"{node.domain}.{node.op_type} has no parser in TensorRT"
    elif node.op_type == "Attention":
        used = [out for out in node.outputs[1:] if out.name and (out.uses() or out.is_graph_output())]
        if used:
            yield (
                "single-output-attention",
                f"{len(used) + 1} outputs; the cache must be concatenated outside",
            )
        if "softmax_precision" in node.attributes:
            yield "attention-attributes", "softmax_precision is an attribute that the parser refuses"
        query = node.inputs[0]
        if query is not None and query.dtype == ir.DataType.FLOAT:
            yield "attention-precision", "float32; the fused attention takes float16 or bfloat16"
