"""int8 decisions made or changed by a test, applied to a graph."""

from __future__ import annotations

from pathlib import Path

from nirvana_deploy.quantize.folder import QuantizedFolder, quantize_onnx
from nirvana_deploy.quantize.int8.spec import Int8Spec, record_of
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.rewriting import QuantizeInputs


def apply_spec(folder: Path, spec: Int8Spec, out: Path) -> QuantizedFolder:
    """Apply ``spec`` to the float ``folder``."""
    decided = record_of(scheme="int8", int8=spec.to_json())
    return quantize_onnx(folder, out, Quantization(scheme="int8"), decided=decided)


def inputs_of(spec: Int8Spec) -> QuantizeInputs:
    """The inputs of an engine by ``spec``."""
    return QuantizeInputs(Quantization(scheme="int8"), decided=record_of(scheme="int8", int8=spec.to_json()))
