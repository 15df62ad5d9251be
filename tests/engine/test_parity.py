"""The ONNX file that the builder is given computes the model: ONNX Runtime on it against torch.

An engine cannot run where there is no GPU; its file can. The reference is the checkpoint's torch module, its
parameters replaced by what the file says they are: half-precision values widened, codes times their scales,
outlier rows added, and, for int8, inputs of each linear rounded to the grid that the file names. The file's
float32 twin (the same file, wider arithmetic) must agree with it to float32's tolerance, and an fp16 file as
it is to what the roundings of its type explain (``relative_tolerance``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from builders.exact_int8 import require_exact_int8
from builders.plans import plan_for
from builders.tiny import write_tiny
from numpy.typing import NDArray
from onnx import numpy_helper

from nirvana_deploy.engine.from_checkpoint import onnx_for_engine
from nirvana_deploy.export.dtypes import DTYPES
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_checkpoint, load_tokenizer
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.output.layout import MODEL_FILE
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import make_plan
from nirvana_deploy.prune.streaming.score import score_units
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.int8.spec import read_record
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.rewriting import QuantizeInputs
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.torch import TorchDecoder
from nirvana_deploy.verify.against_torch import logits_checks
from nirvana_deploy.verify.tolerance import NARROWLY, RELATIVE_TOLERANCE, relative_tolerance

CACHE_TOKENS = 64
FORMS = [("fp16", "concat"), ("fp16", "in-place"), ("w8", "in-place"), ("w4", "concat"), ("int8", "concat")]
Array = NDArray[Any]


def reference_of(folder: Path, checkpoint: Path) -> torch.nn.Module:
    """The checkpoint's module in float32, computing with the numbers that the ONNX file holds."""
    model = load_checkpoint(checkpoint).float()
    file = onnx.load(folder / MODEL_FILE)
    held = {tensor.name: tensor for tensor in file.graph.initializer}
    blocks = {
        node.input[0]: attribute.i
        for node in file.graph.node
        if node.op_type == "DequantizeLinear"
        for attribute in node.attribute
        if attribute.name == "block_size"
    }

    def values(name: str) -> Array:
        return numpy_helper.to_array(held[name]).astype(np.float32)

    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if f"{module}.weight_quantized" in held:
            weight = stored_weight(values, module, blocks.get(f"{module}.weight_quantized", 0))
            new = weight[: parameter.shape[1]].T
        else:
            of_linear = isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear)
            new = values(name).T if of_linear and name.endswith(".weight") else values(name)  # MatMul: [K, N]
        parameter.data = torch.from_numpy(np.ascontiguousarray(new).reshape(parameter.shape))
    for name, linear in model.named_modules():
        if f"{name}.input_scale" in held:
            outliers = None
            if f"{name}.outlier_weight" in held:
                channels = numpy_helper.to_array(held[f"{name}.outlier_channels"]).copy()  # writable
                outliers = (channels, values(f"{name}.outlier_weight"))
            scale = float(values(f"{name}.input_scale"))
            linear.forward = integer_forward(linear, scale, outliers)
    model.model.rotary_emb.register_forward_hook(
        lambda _module, _inputs, angles: tuple(angle.half().float() for angle in angles)
    )
    return model


def stored_weight(values: Callable[[str], Array], module: str, block_size: int) -> Array:
    """[K or more, N] = codes x scale, by the rule of DequantizeLinear."""
    codes, scale = values(f"{module}.weight_quantized"), values(f"{module}.weight_scale")
    return codes * (np.repeat(scale, block_size, axis=0)[: len(codes)] if block_size else scale)


def integer_forward(linear: Any, scale: float, outliers: tuple[Array, Array] | None) -> Callable[[Any], Any]:
    """The linear on inputs rounded to int8 steps (half to even, then clamped), and its outliers in float."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        on_grid = torch.clamp(torch.round(x / scale), -128, 127) * scale
        y: torch.Tensor = torch.nn.functional.linear(on_grid, linear.weight, linear.bias)
        return y if outliers is None else y + x[..., outliers[0]] @ torch.from_numpy(outliers[1])

    return forward


def inputs(precision: str, checkpoint: Path, work: Path, tokens: Array) -> QuantizeInputs:
    """Plain rounding; the decision of int8 is made on the float32 export."""
    if precision != "int8":
        return QuantizeInputs(Quantization(scheme=precision, rounding="plain"))
    onnx_from_checkpoint(Checkpoint.open(checkpoint), work / "float")
    quantize_onnx(work / "float", work / "int8", Quantization(scheme="int8", smooth=0.5), calibration=tokens)
    return QuantizeInputs(Quantization(scheme=precision), decided=read_record(work / "int8"))


def assert_file_computes_model(
    checkpoint: Path, work: Path, precision: str, kv: str, *, layers: int, tokens: Array
) -> None:
    """All comparisons of one form.

    A value on the edge between two integers may fall to the other side in the other runtime, and what follows
    in an int8 model is then not comparable: a single token, before any such value, must agree exactly. Files
    of w8 and w4 are not run as they are: ONNX Runtime would round their inputs to 8 bits, and no engine does.
    """
    folder = onnx_for_engine(
        Checkpoint.open(checkpoint),
        work / "onnx",
        kv=kv,
        quantize=None if precision == "fp16" else inputs(precision, checkpoint, work, tokens),
        cache_tokens=CACHE_TOKENS,
    )
    model: Any = reference_of(folder, checkpoint)
    twin = OrtDecoder(folder, threads=1, in_float32=True)
    exact = logits_checks(TorchDecoder(model), twin, RELATIVE_TOLERANCE, narrowly=NARROWLY)
    assert len(exact) == 5 and exact[0].name == "prefill 1 x 1"
    assert all(check.passed for check in (exact[:1] if precision == "int8" else exact)), exact
    if precision == "fp16":
        rounded = relative_tolerance(DTYPES["fp16"], layers=layers)
        checks = logits_checks(TorchDecoder(model), OrtDecoder(folder, threads=1), rounded)
        assert len(checks) == 5 and all(check.passed for check in checks), checks
    if precision == "int8" and layers == 2:  # so small a model has few such values
        assert sum(check.passed for check in exact) >= 3, exact


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned Qwen3, whose layers differ."""
    folder = tmp_path_factory.mktemp("parity")
    dense = write_tiny(folder / "dense", "qwen3", head_dim=16)
    slice_checkpoint(Checkpoint.open(dense), plan_for(dense), folder / "pruned")
    return folder / "pruned"


@pytest.mark.parametrize(("precision", "kv"), FORMS)
def test_the_file_of_an_engine_computes_a_tiny_model(
    tiny: Path, tmp_path: Path, precision: str, kv: str
) -> None:
    tokens = np.random.default_rng(0).integers(3, 272, size=(4, 24))
    if precision == "int8":
        require_exact_int8()
    assert_file_computes_model(tiny, tmp_path, precision, kv, layers=2, tokens=tokens)


def test_another_weight_is_noticed(tiny: Path, tmp_path: Path) -> None:
    folder = onnx_for_engine(
        Checkpoint.open(tiny),
        tmp_path / "onnx",
        quantize=QuantizeInputs(Quantization(scheme="w8", rounding="plain")),
    )
    model: Any = reference_of(folder, tiny)
    decoder = OrtDecoder(folder, threads=1, in_float32=True)
    assert all(
        check.passed
        for check in logits_checks(TorchDecoder(model), decoder, RELATIVE_TOLERANCE, narrowly=NARROWLY)
    )
    model.model.layers[1].self_attn.v_proj.weight.data[0] *= 1.5
    assert not all(
        check.passed
        for check in logits_checks(TorchDecoder(model), decoder, RELATIVE_TOLERANCE, narrowly=NARROWLY)
    )


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense, and pruned by real scores: a model cut at random magnifies every rounding."""
    dense, pruned = resolve_model("smollm2").path, tmp_path_factory.mktemp("real") / "pruned"
    scores = score_units(Checkpoint.open(dense), real_tokens(dense), saliency="nirvana")
    plan = make_plan(shape_from_config(config_json(dense)), scores, sparsity=0.4, saliency="nirvana")
    slice_checkpoint(Checkpoint.open(dense), plan, pruned)
    return {"dense": dense, "pruned": pruned}


def real_tokens(checkpoint: Path) -> Array:
    """Two windows of a text."""
    text = "The capital of France is Paris, and a list in Python is sorted by its method sort. " * 8
    ids = load_tokenizer(checkpoint)(text)["input_ids"]
    return np.array([ids[:32], ids[32:64]])


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "kv"), FORMS)
@pytest.mark.parametrize("variant", ["dense", "pruned"])
def test_the_file_of_an_engine_computes_smollm2(
    smollm2: Mapping[str, Path], tmp_path: Path, variant: str, precision: str, kv: str
) -> None:
    tokens = real_tokens(smollm2["dense"])
    assert_file_computes_model(smollm2[variant], tmp_path, precision, kv, layers=30, tokens=tokens)
