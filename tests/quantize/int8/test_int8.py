"""W8A8: the folded graph computes the same bits, the quantized one runs in integers and stays near."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from builders.plans import plan_for
from builders.quantized import apply_spec
from builders.tiny import KINDS, write_tiny
from builders.tiny_decoder import write_tiny_decoder
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from onnx import numpy_helper

from nirvana_deploy.base.errors import NirvanaError, VerificationError
from nirvana_deploy.cli.main import commands
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.quantize.coverage import coverage_of
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.graph.layer_runner import Runner
from nirvana_deploy.quantize.graph.linears import open_folder, write_folder
from nirvana_deploy.quantize.int8.decide import calibrated, decide
from nirvana_deploy.quantize.int8.rewrite import quantize_weight
from nirvana_deploy.quantize.int8.scheme import keep_worst, slow_host_note
from nirvana_deploy.quantize.int8.sensitivity import sensitivity_of
from nirvana_deploy.quantize.int8.smooth import apply_folds, find_folds, weight_absmax
from nirvana_deploy.quantize.int8.spec import Int8Linear, Int8Spec, read_spec
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.schemes import SCHEMES
from nirvana_deploy.runtime.divergence import Yardstick
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder


@pytest.fixture(scope="module", params=list(KINDS))
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX folder of a pruned model of each kind: layers differ in heads and widths."""
    folder = tmp_path_factory.mktemp("int8")
    checkpoint = write_tiny(folder / "dense", request.param)
    slice_checkpoint(Checkpoint.open(checkpoint), plan_for(checkpoint), folder / "checkpoint")
    return onnx_from_checkpoint(Checkpoint.open(folder / "checkpoint"), folder / "onnx").path


@pytest.fixture(scope="module")
def llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX folder of the dense tiny Llama."""
    return onnx_from_checkpoint(Checkpoint.open(tiny_llama), tmp_path_factory.mktemp("int8") / "onnx").path


def _initializers(folder: Path) -> dict[str, NDArray[np.generic]]:
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_folding_alone_changes_no_bit(pruned: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    (graph,) = open_folder(pruned)
    folds = find_folds(graph)
    # q, k, v of one norm, o, gate and up of one norm, down; and the head where it is not tied
    untied = not graph.linears[-1].transposed
    assert len(folds) == 4 * 3 + untied and sum(len(fold.readers) for fold in folds) == 7 * 3 + untied
    generator = np.random.default_rng(0)
    factors = {
        fold.name: fold.factors(
            0.7, np.exp(generator.normal(0, 2, fold.position.size)).astype("f4"), weight_absmax(fold)
        )
        for fold in folds
    }
    assert all((np.log2(s) == np.rint(np.log2(s))).all() and s.min() < s.max() for s in factors.values())
    apply_folds(graph, folds, factors)
    write_folder(pruned, tmp_path / "folded", [graph])
    expected, state = OrtDecoder(pruned).prefill(tokens)
    decoder = OrtDecoder(tmp_path / "folded")
    found, folded_state = decoder.prefill(tokens)
    np.testing.assert_array_equal(found, expected)
    again, _ = OrtDecoder(pruned).decode(tokens[:, :1], state)
    np.testing.assert_array_equal(decoder.decode(tokens[:, :1], folded_state)[0], again)


def test_int8_covers_what_it_promises_and_stays_near(
    pruned: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    quantized = quantize_onnx(
        pruned, tmp_path / "int8", Quantization(scheme="int8", smooth=0.5), calibration=tokens
    )
    (graph,) = open_folder(pruned)
    wide = [linear.name for linear in graph.linears if min(linear.K, linear.N) >= 16]
    promised = [name for name in wide if name != "lm_head"]
    assert quantized.coverage.found == quantized.coverage.promised == len(promised)
    assert quantized.coverage.operators == {"MatMulIntegerToFloat": len(promised)}
    record = json.loads((quantized.path / "quantization.json").read_text())
    assert record == quantized.record and record["coverage"]["missing"] == []
    assert set(record["int8"]["linears"]) == set(promised)
    small = set(record["int8"]["kept_float"]) - {"lm_head"}
    assert small == {linear.name for linear in graph.linears} - set(wide)
    yardstick = Yardstick(Runner(pruned).logits, tokens)
    assert yardstick.divergence(Runner(quantized.path).logits) < 0.02
    stored = _initializers(quantized.path)
    for name in promised:
        weight = stored[f"{name}.weight_quantized"]
        assert weight.dtype == np.int8 and weight.min() >= -127
        assert f"{name}.weight" not in stored
        assert stored[f"{name}.weight_scale"].shape == (weight.shape[1],)
        assert not stored[f"{name}.weight_zero_point"].any() and not stored[f"{name}.input_zero_point"].any()


def test_weights_are_rounded_to_the_nearest_code() -> None:
    weight = np.array([[1.0, 0.0, -2.0], [-0.5, 0.0, 0.004]], dtype=np.float32)
    codes, scale = quantize_weight(weight.copy())
    np.testing.assert_array_equal(codes, [[127, 0, -127], [-64, 0, 0]])
    np.testing.assert_allclose(scale[[0, 2]], [1 / 127, 2 / 127], rtol=1e-6)
    assert scale[1] > 0  # a column of zeros has a legal scale
    halves, half_scale = quantize_weight(weight.copy(), scale_dtype=np.dtype(np.float16))
    np.testing.assert_array_equal(half_scale, half_scale.astype(np.float16))
    assert half_scale.min() >= np.finfo(np.float16).smallest_normal
    assert np.abs(halves.astype(np.float32) * half_scale - weight).max() <= half_scale.max() * 0.51


def test_pairs_are_never_shared(llama: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    quantize_onnx(
        llama, tmp_path / "int8", Quantization(scheme="int8", smooth="none", head=True), calibration=tokens
    )
    model = onnx.load(tmp_path / "int8/model.onnx", load_external_data=False)
    pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(pairs) == 7 * 3 + 1  # the head too
    assert len({node.input[1] for node in pairs}) == len({node.input[2] for node in pairs}) == len(pairs)
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    dequantized = [node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert {readers[name] for name in dequantized} == {1}


def test_shared_pairs_are_found_out(llama: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    quantized = quantize_onnx(
        llama, tmp_path / "int8", Quantization(scheme="int8", smooth="none"), calibration=tokens
    )
    path = quantized.path / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    of = {node.name: node for node in model.graph.node}
    first, second = (f"model.layers.1.self_attn.{part}_proj.input_dequantized" for part in "qk")
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == of[second].output[0]:
                node.input[index] = of[first].output[0]
    path.write_bytes(model.SerializeToString())
    coverage = coverage_of(
        quantized.path, quantized.record["int8"]["linears"], kernels=SCHEMES["int8"].integer_kernels
    )
    assert coverage.found == 19 and coverage.promised == 21
    assert set(coverage.missing) == {f"model.layers.1.self_attn.{part}_proj" for part in "qk"}
    with pytest.raises(VerificationError, match=r"19/21 linears.*float still run model.layers.1.self_attn.q"):
        coverage.require_whole(quantized.path)


def test_outlier_channels_run_in_float_beside_the_integers(
    llama: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    (graph,) = open_folder(llama)
    calibration = calibrated(llama, [graph], tokens, head=False)
    spec = decide(calibration, alpha=None)
    assert any(linear.outliers for name, linear in spec.linears.items() if name.endswith("down_proj"))
    assert not any(linear.outliers for name, linear in spec.linears.items() if "self_attn" in name)
    for name, linear in spec.linears.items():
        channels = calibration.observed[name].channel_absmax
        inside = np.delete(channels, linear.outliers)
        assert linear.bound == inside.max() < min(channels[list(linear.outliers)], default=np.inf)
    # every channel of down apart: only the other linears still have an error
    yardstick = Yardstick(Runner(llama).logits, tokens)
    apart = {
        name: Int8Linear(bound=1e-3, outliers=tuple(range(40))) if name.endswith("down_proj") else linear
        for name, linear in spec.linears.items()
    }
    found = {}
    for label, linears in (("apart", apart), ("plain", spec.linears)):
        folder = tmp_path / label
        apply_spec(llama, Int8Spec(linears=linears, smoothing={}, alpha=None, ranges="minmax"), folder)
        found[label] = yardstick.divergence(Runner(folder).logits)
    assert found["apart"] < found["plain"] < 0.1


def test_the_decision_can_be_applied_again(llama: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    first = quantize_onnx(
        llama, tmp_path / "first", Quantization(scheme="int8", smooth=0.8), calibration=tokens
    )
    second = apply_spec(llama, read_spec(first.path), tmp_path / "second")
    a, b = _initializers(first.path), _initializers(second.path)
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
    assert read_spec(second.path).to_json() == read_spec(first.path).to_json()
    other = write_tiny_decoder(tmp_path / "other")
    with pytest.raises(NirvanaError, match=r"does not fit the quantization: it has no model\.layers\.0"):
        apply_spec(other, read_spec(first.path), tmp_path / "third")
    with pytest.raises(NirvanaError, match="was not quantized by this tool"):
        read_spec(llama)


def test_alpha_is_chosen_by_divergence(llama: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    quantized = quantize_onnx(
        llama, tmp_path / "int8", Quantization(scheme="int8"), calibration=tokens[:4], heldout=tokens
    )
    tried = {entry["alpha"]: entry["kl"] for entry in quantized.record["alpha_by_kl"]}
    assert set(tried) == {0.5, 0.6, 0.7, 0.8, 0.9} and len(set(tried.values())) == 5
    assert quantized.record["int8"]["alpha"] == min(tried, key=lambda alpha: tried[alpha])
    assert not list(tmp_path.glob(".partial-*"))


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_other_ranges_reach_less_far(
    llama: Path, tmp_path: Path, tokens: NDArray[np.int64], method: str
) -> None:
    (graph,) = open_folder(llama)
    calibration = calibrated(llama, [graph], tokens, head=False)
    full, less = (decide(calibration, alpha=0.5, ranges=ranges) for ranges in ("minmax", method))
    assert full.linears.keys() == less.linears.keys()
    shares = [less.linears[name].bound / full.linears[name].bound for name in full.linears]
    assert max(shares) <= 1.0 + 1e-6 and min(shares) < 1.0 and min(shares) > 0


def test_useless_calibration_is_refused(llama: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    def quantize(folder: Path, calibration: NDArray[np.int64] | None, **options: object) -> None:
        quantize_onnx(
            folder, tmp_path / "out", Quantization(scheme="int8", **options), calibration=calibration
        )  # type: ignore[arg-type]

    with pytest.raises(NirvanaError, match="none were given"):
        quantize(llama, None)
    with pytest.raises(NirvanaError, match="windows of 1 token say nothing about prompts"):
        quantize(llama, tokens[:, :1])
    with pytest.raises(NirvanaError, match=r"\[N, T\] with N >= 1"):
        quantize(llama, tokens[:0])
    with pytest.raises(NirvanaError, match="alpha must lie in"):
        quantize(llama, tokens, smooth=1.5)
    with pytest.raises(NirvanaError, match=r"Unknown range method 'minimax'\. Did you mean 'minmax'"):
        quantize(llama, tokens, ranges="minimax")
    with pytest.raises(NirvanaError, match=r"Unknown scheme 'int9'\. Did you mean 'int8'"):
        quantize_onnx(llama, tmp_path / "out", Quantization(scheme="int9"), calibration=tokens)
    for value, message in (
        (0.0, "All calibration activations"),
        (np.nan, "NaN or infinite"),
    ):
        (graph,) = open_folder(llama)
        norm = graph.model.graph.initializers["model.layers.1.post_attention_layernorm.weight"]
        graph.rewrite(norm, lambda weight, value=value: np.full_like(weight, value))
        broken = tmp_path / f"broken-{value}"
        write_folder(llama, broken, [graph])
        with pytest.raises(NirvanaError, match=message) as caught:
            quantize(broken, tokens)
        assert "model.layers.1.mlp.gate_proj" in caught.value.message
        assert "export it" not in str(caught.value)  # it is fp32 already
    assert not (tmp_path / "out").exists()


def test_quantizing_twice_is_refused(llama: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    quantize_onnx(llama, tmp_path / "int8", Quantization(scheme="int8", smooth="none"), calibration=tokens)
    with pytest.raises(NirvanaError, match="quantized already"):
        quantize_onnx(tmp_path / "int8", tmp_path / "again", Quantization(scheme="int8"), calibration=tokens)


def test_a_host_without_dot_products_is_told() -> None:
    assert "no integer dot product" in str(slow_host_note({"avx2", "fma"}))
    assert slow_host_note({"avx2", "avx512_vnni"}) is None and slow_host_note(None) is None


def test_sensitivity_finds_the_linear_that_was_made_bad(
    llama: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    (graph,) = open_folder(llama)
    spec = decide(calibrated(llama, [graph], tokens, head=False), alpha=0.5)
    bad = "model.layers.1.mlp.up_proj"
    clipped = replace(spec.linears[bad], bound=spec.linears[bad].bound / 40)
    spec = replace(spec, linears={**spec.linears, bad: clipped})
    found = sensitivity_of(llama, spec, tokens, at_least=8, scratch=tmp_path)
    assert set(found.layers) == {"0", "1", "2"} and next(iter(found.layers)) == "1"
    names = list(found.linears)
    assert names[0] == bad and len(names) in (14, 21) and found.linears[bad] > 2 * found.linears[names[1]]
    kept = keep_worst(spec, found, 1)
    assert bad not in kept.linears and "worst" in kept.kept_float[bad] and len(kept.linears) == 20
    assert not list(tmp_path.glob(".partial-*"))
    # the same measured by building it: the switch computes what the quantized folder computes
    alone = replace(spec, linears={bad: clipped})
    apply_spec(llama, alone, tmp_path / "alone")
    built = Yardstick(Runner(llama).logits, tokens, max_windows=2).divergence(
        Runner(tmp_path / "alone").logits
    )
    assert found.linears[bad] == pytest.approx(built, rel=1e-3)


def test_the_worst_linears_stay_float(llama: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    quantized = quantize_onnx(
        llama, tmp_path / "int8", Quantization(scheme="int8", smooth=0.5, keep_fp=2), calibration=tokens
    )
    record = quantized.record
    worst = list(record["sensitivity"]["linears"])[:2]
    assert quantized.coverage.promised == quantized.coverage.found == 19
    assert set(record["int8"]["kept_float"]) == {"lm_head", *worst}
    assert {f"{name}.weight" for name in worst} <= set(_initializers(quantized.path))
    with pytest.raises(NirvanaError, match="of at least 0"):
        quantize_onnx(llama, tmp_path / "x", Quantization(scheme="int8", keep_fp=-1), calibration=tokens)


def test_the_command_quantizes_an_onnx_folder(llama: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "int8"
    text.write_text(" ".join(f"Line {number} is prose of its own." for number in range(150)))
    drawn = ["--calib", str(text), "--num-sequences", "4", "--seq-len", "32", "--smooth", "0.7"]
    command = ["quantize", str(llama), "--scheme", "int8"]

    def run(*options: str) -> Result:
        return CliRunner().invoke(commands, [*command, *options])

    told = run("--out", str(out), *drawn, "--sensitivity")
    assert told.exit_code == 0, told.output
    assert "21/21 linears run in integer kernels" in told.stdout and "Worst linears:" in told.stdout
    assert "in float: lm_head (head" in told.stdout
    drawing = ElementTree.parse(out / "sensitivity.svg").getroot()
    assert drawing.tag.endswith("svg") and "Worst: " in drawing.attrib["aria-label"]
    again = run("--out", str(out), *drawn)
    assert isinstance(again.exception, NirvanaError) and "exists already" in str(again.exception)
    forced = run("--out", str(out), *drawn, "--force", "--json")
    assert json.loads(forced.stdout)["coverage"]["found"] == 21
    assert run().exit_code == 2


def test_a_tied_head_is_smoothed_in_a_weight_of_its_own(
    llama: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    (graph,) = open_folder(llama)
    graph.untie(["lm_head"])
    assert graph.linears[-1].name == "lm_head" and not graph.linears[-1].transposed
    (fold,) = (fold for fold in find_folds(graph) if fold.name == "lm_head")
    apply_folds(graph, [fold], {"lm_head": np.exp2(np.arange(48) % 5).astype(np.float32)})
    write_folder(llama, tmp_path / "folded", [graph])
    expected, _ = OrtDecoder(llama).prefill(tokens)
    np.testing.assert_array_equal(OrtDecoder(tmp_path / "folded").prefill(tokens)[0], expected)

    done = quantize_onnx(
        llama, tmp_path / "int8", Quantization(scheme="int8", smooth=0.5, head=True), calibration=tokens
    )
    assert done.coverage.found == 22 and "lm_head" in done.record["int8"]["smoothing"]
    stored = _initializers(done.path)
    before = _initializers(llama)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], before)
    assert "lm_head.weight" not in stored and stored["lm_head.weight_quantized"].shape == (48, 272)
    yardstick = Yardstick(Runner(llama).logits, tokens)
    assert yardstick.divergence(Runner(done.path).logits) < 0.02
