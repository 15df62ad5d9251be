"""``quantize_onnx``: a float ONNX folder to a quantized one, with the proof and the decision beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.ownership.temporary import scratch_folder
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.quantize.coverage import Coverage, coverage_of
from nirvana_deploy.quantize.graph.linears import RECORD_FILE, open_folder, write_folder
from nirvana_deploy.quantize.int8.spec import record_of
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.refused import refused_by_tensorrt
from nirvana_deploy.quantize.rewriting import QuantizeInputs, rewrite_function
from nirvana_deploy.quantize.schemes import onnx_scheme


@dataclass(frozen=True)
class QuantizedFolder:
    """A quantized ONNX folder that was counted."""

    path: Path
    coverage: Coverage
    record: dict[str, Any]
    """Content of its quantization.json."""

    def __repr__(self) -> str:
        return f"QuantizedFolder({str(self.path)!r}, {self.coverage.line})"


@dataclass(frozen=True)
class WrittenFolder:
    """A quantized ONNX folder as it was written."""

    linears: list[str]
    """Names of the quantized linears."""
    record: dict[str, Any]
    """Content of its quantization.json."""
    weights_bytes: int
    """Size of its external data."""
    float_bytes: int
    """The same of the folder that it was made from."""
    half_precision: bool
    """Whether linears compute in float16 or bfloat16."""


def quantize_onnx(
    folder: Path,
    out: Path,
    recipe: Quantization,
    *,
    calibration: NDArray[np.int64] | None = None,
    heldout: NDArray[np.int64] | None = None,
    decided: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> QuantizedFolder:
    """Quantize the float ONNX ``folder`` into ``out``, which appears whole and replaces what was there.

    ``calibration`` [N, T] are token ids, which int8 needs and calibrated rounding fits codes to; ``heldout``
    [M, T'] those that choices are made by, the calibration windows when None. ``decided`` is the record of
    another export of the same checkpoint: its decision is applied, scales in the dtype of this graph.

    Raises NirvanaError for a folder that is quantized already, has no linears or does not fit ``decided``, an
    unknown scheme or option, and calibration that is missing or useless; VerificationError, ``out`` kept,
    when ONNX Runtime runs fewer linears in integer kernels than promised (float32 graphs; it has none for
    half precision).
    """
    scheme = onnx_scheme(recipe.scheme)
    inputs = QuantizeInputs(recipe, calibration, heldout, decided)
    written = write_quantized(folder, out, inputs, progress=progress)
    coverage = coverage_of(out, written.linears, kernels=scheme.integer_kernels)
    record = {
        **written.record,
        "weights_bytes": written.weights_bytes,
        "float_bytes": written.float_bytes,
        "coverage": coverage.to_json(),
        "tensorrt_findings": [asdict(finding) for finding in refused_by_tensorrt(out)],
    }
    write_json(out / RECORD_FILE, record)
    if written.half_precision:
        progress.note(
            f"{len(written.linears)} linears are stored as {scheme.name} in a half-precision graph, for "
            "TensorRT. ONNX Runtime on a CPU computes it in float: its integer kernels read float32."
        )
    else:
        progress.note(coverage.line)
        coverage.require_whole(out)
    return QuantizedFolder(out, coverage, record)


def write_quantized(
    folder: Path, out: Path, inputs: QuantizeInputs, *, progress: Progress = SILENT
) -> WrittenFolder:
    """Rewrite the graphs of ``folder`` into ``out``; nothing is proved of what a runtime makes of them."""
    graphs = open_folder(folder)
    float_bytes = sum(graph.weights_bytes for graph in graphs)
    half = any(linear.dtype != ir.DataType.FLOAT for graph in graphs for linear in graph.linears)
    with scratch_folder(out.parent) as scratch:
        rewritten = rewrite_function(inputs.scheme)(graphs, inputs, scratch=scratch, progress=progress)
        record = record_of(scheme=inputs.scheme.name, **rewritten.record)
        weights_bytes = write_folder(folder, out, graphs, records={RECORD_FILE: record}, progress=progress)
    return WrittenFolder(rewritten.linears, record, weights_bytes, float_bytes, half)
