"""Proof that the linears run in integer kernels: the graph as ONNX Runtime optimizes it, counted.

ONNX Runtime does not say when it runs a Q/DQ graph in float; it does so, several times slower than the float
graph, wherever a pair is not what its fusions look for. So the optimized graph is saved and read, layer by
layer (``cut.py``), so that a model larger than memory is counted too: what fusions look at lies within a
layer, and the sum over the layers is what the whole graph gives.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from nirvana_deploy.base.errors import VerificationError
from nirvana_deploy.base.ownership.temporary import scratch_folder
from nirvana_deploy.export.packed import unpacked_names
from nirvana_deploy.quantize.graph.layer_parts import Cut, session_of
from nirvana_deploy.quantize.int8.spec import read_record, recorded_linears
from nirvana_deploy.quantize.schemes import onnx_scheme

_DTYPES = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(float16)": onnx.TensorProto.FLOAT16,
    "tensor(bfloat16)": onnx.TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class Coverage:
    """How many of the promised linears run in integer kernels."""

    promised: int
    found: int
    operators: dict[str, int]
    """Integer operators of the optimized graphs, counted."""
    missing: tuple[str, ...]
    """Promised linears that run in float all the same."""

    @property
    def line(self) -> str:
        """For people: "210/210 linears run in integer kernels (210 MatMulIntegerToFloat)"."""
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.operators.items()))
        return f"{self.found}/{self.promised} linears run in integer kernels ({kinds or 'none'})"

    def to_json(self) -> dict[str, Any]:
        """For quantization.json."""
        return {**asdict(self), "missing": list(self.missing)}

    def require_whole(self, folder: Path) -> None:
        """Raise VerificationError (exit code 3) that names the linears which run in float."""
        if not self.missing:
            return
        named = ", ".join(self.missing[:5]) + (", ..." if len(self.missing) > 5 else "")
        raise VerificationError(
            f"{folder}: {self.line} of ONNX Runtime; in float still run {named}.",
            hint="The folder is kept. 'nirvana-deploy doctor' shows the version of ONNX Runtime.",
        )


def coverage_of(
    folder: Path, promised: Collection[str], *, kernels: Collection[str], scratch: Path | None = None
) -> Coverage:
    """Optimize every graph of ``folder`` and look for the ``promised`` linears, by module name.

    A linear counts when one of the operators ``kernels`` reads an initializer named after it, or after it and
    its siblings (``packing.py``). ``scratch`` is where an optimized layer is written for a moment, weights
    included; by default beside ``folder``.
    """
    operators: Counter[str] = Counter()
    found: set[str] = set()
    names = frozenset(promised)
    with scratch_folder(scratch or folder.parent) as temporary:
        for path in sorted(folder.glob("*.onnx")):
            for node in _optimized(Cut(path, threads=1), temporary):
                if node.op_type in kernels:
                    operators[node.op_type] += 1
                    found |= _linears_read(node, names)
    return Coverage(
        promised=len(promised),
        found=len(found),
        operators=dict(operators),
        missing=tuple(name for name in promised if name not in found),
    )


def recorded_coverage(folder: Path) -> Coverage:
    """Of a quantized ``folder``, the linears that its record counted, looked for once more.

    None were counted in half precision, for which ONNX Runtime's CPU provider has no integer kernels: there
    none are promised. Raises NirvanaError without a record.
    """
    record = read_record(folder)
    kernels = onnx_scheme(record["scheme"]).integer_kernels
    in_float = set(record["coverage"]["missing"])
    with tempfile.TemporaryDirectory(prefix="nirvana-verify-") as scratch:
        promised = [name for name in recorded_linears(record) if name not in in_float]
        return coverage_of(folder, promised, kernels=kernels, scratch=Path(scratch))


def _optimized(cut: Cut, scratch: Path) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph as ONNX Runtime makes them, part by part."""
    given = {name: cut.dtype_of(name) for name in cut.table_names()}  # embeddings are large, and looked up
    for end, outputs in zip(cut.ends, cut.of_parts(cut.outputs), strict=True):
        wanted = list(dict.fromkeys([*outputs, *end]))
        path = scratch / cut.path.name
        session = session_of(cut.part(wanted, given), cut.path.parent, threads=1, optimized=path)
        types = {output.name: output.type for output in session.get_outputs()}
        del session
        yield from onnx.load(path, load_external_data=False).graph.node
        given = {name: _DTYPES[types[name]] for name in end}


def _linears_read(node: onnx.NodeProto, promised: AbstractSet[str]) -> set[str]:
    names: set[str] = set()
    for value in node.input:
        names |= promised & set(unpacked_names(value.partition(".weight")[0]))
    return names
