"""int8 in every form of the export: flavors, half precision, encoder-decoders."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders.exact_int8 import require_exact_int8
from builders.lint import lint
from builders.plans import plan_for
from builders.quantized import apply_spec
from builders.tiny import VOCABULARY, write_tiny
from builders.tiny_t5 import KINDS as T5_KINDS
from builders.tiny_t5 import write_t5
from numpy.typing import NDArray

from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.graph.layer_runner import Runner
from nirvana_deploy.quantize.graph.linears import open_folder, write_folder
from nirvana_deploy.quantize.int8.smooth import apply_folds, find_folds, weight_absmax
from nirvana_deploy.quantize.int8.spec import read_spec
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.runtime.divergence import Yardstick


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned Qwen2 checkpoint, with biases."""
    folder = tmp_path_factory.mktemp("forms")
    dense = write_tiny(folder / "dense", "qwen2")
    slice_checkpoint(Checkpoint.open(dense), plan_for(dense), folder / "pruned")
    return folder / "pruned"


@pytest.fixture(scope="module", params=list(T5_KINDS))
def t5(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX folder of a pruned T5 of each kind."""
    folder = tmp_path_factory.mktemp("t5-int8")
    dense = write_t5(folder / "dense", request.param)
    slice_checkpoint(Checkpoint.open(dense), plan_for(dense, seed=0), folder / "pruned")
    onnx_from_checkpoint(Checkpoint.open(folder / "pruned"), folder / "onnx")
    return folder / "onnx"


@pytest.mark.parametrize("flavor", ["gqa", "static-cache"])
def test_other_flavors_are_quantized_alike(tmp_path: Path, tokens: NDArray[np.int64], flavor: str) -> None:
    dense = write_tiny(tmp_path / "dense", "qwen3")
    pruned = tmp_path / "pruned"
    slice_checkpoint(Checkpoint.open(dense), plan_for(dense), pruned)
    onnx_from_checkpoint(Checkpoint.open(pruned), tmp_path / "portable")
    cache_tokens = 32 if flavor == "static-cache" else None
    onnx_from_checkpoint(Checkpoint.open(pruned), tmp_path / flavor, flavor=flavor, cache_tokens=cache_tokens)
    specs, found = [], []
    for name in ("portable", flavor):
        folder = tmp_path / name
        done = quantize_onnx(
            folder, tmp_path / f"{name}-8", Quantization(scheme="int8", smooth=0.6), calibration=tokens
        )
        assert done.coverage.found == done.coverage.promised
        specs.append(read_spec(done.path))
        found.append(Yardstick(Runner(folder).logits, tokens).divergence(Runner(done.path).logits))
    assert specs[0].linears.keys() == specs[1].linears.keys()
    for name, linear in specs[0].linears.items():
        assert specs[1].linears[name].bound == pytest.approx(linear.bound, rel=1e-3)
    assert max(found) < 0.02 and found[1] == pytest.approx(found[0], rel=0.2)


def test_the_decision_fits_a_float16_export(pruned: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    onnx_from_checkpoint(Checkpoint.open(pruned), tmp_path / "fp32")
    onnx_from_checkpoint(Checkpoint.open(pruned), tmp_path / "fp16", dtype="fp16")
    done = quantize_onnx(
        tmp_path / "fp32", tmp_path / "int8", Quantization(scheme="int8", smooth=0.6), calibration=tokens
    )
    half = apply_spec(tmp_path / "fp16", read_spec(done.path), tmp_path / "fp16-int8")
    model = onnx.load(half.path / "model.onnx")
    scales = [tensor for tensor in model.graph.initializer if tensor.name.endswith("_scale")]
    assert scales and {tensor.data_type for tensor in scales} == {onnx.TensorProto.FLOAT16}
    assert lint(half.path) == ()
    yardstick = Yardstick(Runner(tmp_path / "fp32").logits, tokens)
    assert yardstick.divergence(Runner(half.path).logits) < 0.02


@pytest.mark.integration
def test_encoder_decoders_are_quantized_in_both_graphs(t5: Path, tmp_path: Path) -> None:
    windows = np.random.default_rng(0).integers(3, VOCABULARY, size=(4, 24))
    graphs = open_folder(t5)
    folds = {graph.path.name: find_folds(graph) for graph in graphs}
    roles = {
        name: [re.sub("[kv]", "q", fold.readers[0].role) for fold in several]
        for name, several in folds.items()
    }
    gated = any(linear.role == "gate" for graph in graphs for linear in graph.linears)
    ffn = ["gate", "down"] if gated else ["up", "down"]
    assert roles["encoder_model.onnx"] == ["q", "o", *ffn] * 3
    # the cross-attention's k and v read the encoder's states, which no norm of this graph makes
    assert roles["decoder_model_merged.onnx"] == ["q", "o", "q", "o", *ffn] * 2 + ["head"] * gated
    expected = next(Runner(t5).logits(windows[:1]))
    for graph in graphs:
        factors = {
            fold.name: fold.factors(
                0.7, np.geomspace(0.1, 9, fold.position.size).astype("f4"), weight_absmax(fold)
            )
            for fold in folds[graph.path.name]
        }
        apply_folds(graph, folds[graph.path.name], factors)
    write_folder(t5, tmp_path / "folded", graphs)
    np.testing.assert_array_equal(next(Runner(tmp_path / "folded").logits(windows[:1])), expected)

    done = quantize_onnx(t5, tmp_path / "int8", Quantization(scheme="int8", keep_fp=1), calibration=windows)
    assert done.coverage.found == done.coverage.promised > 20
    assert {name.split(".")[0] for name in read_spec(done.path).linears} == {"encoder", "decoder"}
    assert any(layer.startswith("cross") for layer in done.record["sensitivity"]["layers"])
    assert {file.name for file in done.path.iterdir()} == {file.name for file in t5.iterdir()} | {
        "quantization.json"
    }
    require_exact_int8()
    assert Yardstick(Runner(t5).logits, windows).divergence(Runner(done.path).logits) < 0.02
    # the embedding, which both graphs read, still lies on disk once
    embedding = 4 * VOCABULARY * 48
    assert (
        done.record["weights_bytes"]
        < embedding * (2 if "lm_head" in str(done.record) and gated else 1) + 120_000
    )


@pytest.mark.integration
@pytest.mark.parametrize("scheme", ["w8", "w4"])
def test_encoder_decoders_are_rounded_in_both_graphs(t5: Path, tmp_path: Path, scheme: str) -> None:
    windows = np.random.default_rng(0).integers(3, VOCABULARY, size=(24, 24))
    yardstick = Yardstick(Runner(t5).logits, windows[20:])
    kl = {}
    for rounding in ("plain", "gptq"):
        done = quantize_onnx(
            t5, tmp_path / rounding, Quantization(scheme=scheme, rounding=rounding), calibration=windows[:20]
        )
        assert done.coverage.found == done.coverage.promised > 20
        kl[rounding] = yardstick.divergence(Runner(done.path).logits)
    assert kl["gptq"] < kl["plain"]
