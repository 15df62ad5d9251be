"""The table of schemes: a scheme that no module of the package knows of is written, counted and verified."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import Progress
from nirvana_deploy.engine.recipe import EngineForm
from nirvana_deploy.engine.source import read_source
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.variants import variant_named
from nirvana_deploy.quantize.folder import quantize_onnx, write_quantized
from nirvana_deploy.quantize.graph.linears import OnnxGraph
from nirvana_deploy.quantize.int8.spec import read_record
from nirvana_deploy.quantize.recipe import Quantization, Schemes
from nirvana_deploy.quantize.rewriting import QuantizeInputs, Rewritten, rewrite_function
from nirvana_deploy.quantize.schemes import SCHEMES, Scheme, onnx_schemes
from nirvana_deploy.quantize.weights.rounding import RoundedWeight
from nirvana_deploy.quantize.weights.write import rounded_in_parts, write_rounded
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.verify.folder import verify_onnx_folder
from nirvana_deploy.verify.tolerance import device_tolerance

BLOCK = 16
SIGN = Scheme(
    name="sign",
    summary="weights as signs of their block's mean",
    rewrites=f"{__name__}:rewrite_signs",
    weight_bits=4,
    stored_as=("INT4",),
    options=frozenset({"writing"}),
    integer_kernels=frozenset({"MatMulNBits"}),
)


def signs(weight: NDArray[np.float32]) -> RoundedWeight:
    """W [K, N] as +-1 times the mean magnitude of each block."""
    blocks = np.add.reduceat(np.abs(weight), np.arange(0, len(weight), BLOCK), axis=0) / BLOCK
    codes = np.where(weight < 0, -1, 1).astype(np.int8)
    return RoundedWeight(codes=codes, scales=blocks, bits=4, block_size=BLOCK)


def rewrite_signs(
    graphs: Sequence[OnnxGraph], inputs: QuantizeInputs, *, scratch: Path, progress: Progress
) -> Rewritten:
    names = []
    for graph in graphs:
        for linear in graph.linears:
            if linear.role in ("gate", "up", "down"):
                rounded = partial(rounded_in_parts, linear, signs)
                writing = inputs.recipe.writing
                write_rounded(graph, linear, rounded, bits=4, block_size=BLOCK, writing=writing)
                names.append(linear.name)
    return Rewritten(names, {"linears": names})


@pytest.fixture
def sign(monkeypatch: pytest.MonkeyPatch) -> Scheme:
    """The row, in the table for one test."""
    monkeypatch.setitem(SCHEMES, "sign", SIGN)
    return SIGN


@pytest.fixture(scope="module")
def floats(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX folder of the tiny Llama."""
    return onnx_from_checkpoint(Checkpoint.open(tiny_llama), tmp_path_factory.mktemp("schemes") / "onnx").path


@pytest.mark.usefixtures("sign")
def test_a_new_row_is_a_scheme(floats: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Written, counted, recorded, run and verified; commands and variants know its name."""
    done = quantize_onnx(floats, tmp_path / "onnx-sign", Quantization(scheme="sign"))
    assert done.coverage.found == done.coverage.promised == 9
    assert done.coverage.operators == {"MatMulNBits": 9} and done.coverage.missing == ()
    record = read_record(done.path)
    assert record == done.record and record["scheme"] == "sign" and len(record["linears"]) == 9
    logits, _ = OrtDecoder(done.path).prefill(np.arange(3, 12)[None])
    assert np.isfinite(logits).all()
    verified = verify_onnx_folder(done.path, model=str(tiny_llama))
    verified.require_passed()
    assert verified.quantized["model"].found == 9
    assert variant_named("pruned-sign").scheme == "sign"
    assert Schemes(quantize=("sign",)).quantize == ("sign",)
    assert EngineForm(quantize="sign").quantize == "sign"


def test_a_new_row_is_a_precision_of_engines(
    monkeypatch: pytest.MonkeyPatch, floats: Path, tmp_path: Path
) -> None:
    """Where ONNX Runtime has no kernels, the row says why, and the graph for an engine is written."""
    row = dataclasses.replace(SIGN, only_engines="this test says so", stored_as=("INT2",), weight_bits=2)
    monkeypatch.setitem(SCHEMES, "sign", row)
    assert "sign" not in onnx_schemes()
    with pytest.raises(NirvanaError, match=r"(?s)sign is a precision of engines alone: this test says so"):
        quantize_onnx(floats, tmp_path / "q", Quantization(scheme="sign"))
    with pytest.raises(NirvanaError, match="quantize"):
        Schemes(quantize=("sign",))
    assert EngineForm(quantize="sign").quantize == "sign"
    inputs = QuantizeInputs(Quantization(scheme="sign", writing="tensorrt"))
    written = write_quantized(floats, tmp_path / "q", inputs)
    assert written.linears == read_record(tmp_path / "q")["linears"] and not written.half_precision
    operators = {node.op_type for node in onnx.load(tmp_path / "q" / "model.onnx").graph.node}
    assert "DequantizeLinear" in operators and "MatMulNBits" not in operators
    assert read_source(tmp_path / "q" / "model.onnx").quantization == "w4"  # as it is stored


def test_every_row_names_what_exists() -> None:
    fields = {field.name for field in dataclasses.fields(Quantization)}
    for name, scheme in SCHEMES.items():
        assert scheme.name == name and callable(rewrite_function(scheme))
        assert scheme.options < fields
        assert all(hasattr(onnx.TensorProto, dtype) for dtype in scheme.stored_as)
        assert (scheme.only_engines is None) == bool(scheme.integer_kernels)
    assert onnx_schemes() == ("int8", "w8", "w4")


def test_fp8_is_refused_where_no_engine_is_built(floats: Path, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"(?s)fp8 is a precision of engines.*build-engine DIR --quantize"):
        quantize_onnx(floats, tmp_path / "q", Quantization(scheme="fp8"))


@pytest.mark.parametrize("name", ["int8", "w8", "w4", "fp8"])
def test_rounded_activations_differ_by_more(name: str) -> None:
    """A rounding that falls to the other side moves an activation of 8 bits as far as one of bfloat16."""
    as_bfloat16 = device_tolerance("fp16", layers=4, quantization=name) == device_tolerance("bf16", layers=4)
    assert as_bfloat16 == (SCHEMES[name].activation_bits is not None)


def test_the_table_is_light() -> None:
    """Command lines read their choices from it."""
    code = "import sys, nirvana_deploy.quantize.schemes; print(*sys.modules)"
    loaded: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "onnx", "onnx_ir", "torch", "ml_dtypes"} & set(loaded.stdout.split())
