"""w8 and w4: two writings of the same numbers, which every runtime computes with, fitted layer by layer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders.extras import needs
from builders.plans import plan_for
from builders.scripts import ROOT
from builders.tiny import KINDS, write_tiny
from builders.tiny_decoder import write_tiny_decoder
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import numpy_helper

from nirvana_deploy.base.artifact import take
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.cli.main import commands
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.export.packed import unpacked_names
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.graph.layer_parts import Cut, session_of
from nirvana_deploy.quantize.graph.layer_runner import Runner
from nirvana_deploy.quantize.graph.linears import Linear, open_folder, write_folder
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.schemes import SCHEMES
from nirvana_deploy.quantize.weights.layerwise import round_layerwise
from nirvana_deploy.quantize.weights.rounding import RoundedWeight, round_weight
from nirvana_deploy.runtime.divergence import Yardstick
from nirvana_deploy.runtime.genai import GenaiModel
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder, session_outputs
from nirvana_deploy.runtime.runner import greedy_tokens

HEAD_DIM = 16  # GroupQueryAttention takes multiples of it
KL_AT_MOST = {"w8": 0.01, "w4": 1.0}  # nats, of tiny random models
Quantize = Callable[..., Path]


@pytest.fixture(scope="module", params=list(KINDS))
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX folder of a pruned model of each kind: layers differ, and widths are no multiple of a block."""
    folder = tmp_path_factory.mktemp("low-bit")
    checkpoint = write_tiny(folder / "dense", request.param)
    slice_checkpoint(Checkpoint.open(checkpoint), plan_for(checkpoint), folder / "checkpoint")
    return onnx_from_checkpoint(Checkpoint.open(folder / "checkpoint"), folder / "onnx").path


@pytest.fixture(scope="module")
def llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX folder of the dense tiny Llama."""
    return onnx_from_checkpoint(Checkpoint.open(tiny_llama), tmp_path_factory.mktemp("low-bit") / "onnx").path


def stored_weight(folder: Path, linear: Linear, among: Sequence[Linear]) -> NDArray[np.float32]:
    """The weight [K, N] that a quantized folder stands for, read from its bytes by the operators' rules.

    It may lie beside its siblings, some of ``among``.
    """
    model = onnx.load(folder / "model.onnx")
    of_name = {tensor.name: tensor for tensor in model.graph.initializer}
    (stored,) = (
        module
        for module, _, kind in (tensor.partition(".weight_") for tensor in of_name)
        if kind == "quantized" and linear.name in unpacked_names(module)
    )
    siblings = unpacked_names(stored)
    before = sum(other.N for other in among if other.name in siblings[: siblings.index(linear.name)])
    columns = slice(before, before + linear.N)
    codes = numpy_helper.to_array(of_name[f"{stored}.weight_quantized"])
    scales = numpy_helper.to_array(of_name[f"{stored}.weight_scale"]).astype(np.float32)
    (node,) = (node for node in model.graph.node if f"{stored}.weight_quantized" in node.input)
    attributes = {a.name: a.i for a in node.attribute}
    if node.op_type == "MatMulNBits":
        K, N, bits = (attributes[key] for key in ("K", "N", "bits"))
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1)
        blocks = codes.reshape(N, scales.shape[1], -1).astype(np.float32) - 2 ** (bits - 1)
        weight: NDArray[np.float32] = (blocks * scales[..., None]).reshape(N, -1)[:, :K].T
        return weight[:, columns]
    values = codes.astype(np.float32)
    if attributes["axis"] == 1:
        return values * scales
    assert len(values) % len(scales) == 0  # whole blocks, or TensorRT guesses another block size
    return values * np.repeat(scales, attributes["block_size"], axis=0)[: len(values)]


@pytest.mark.parametrize(
    ("scheme", "block_size", "rounding"), [("w8", 32, "plain"), ("w4", 32, "gptq"), ("w4", 64, "plain")]
)
def test_both_writings_hold_the_same_numbers(
    pruned: Path, tmp_path: Path, tokens: NDArray[np.int64], scheme: str, block_size: int, rounding: str
) -> None:
    folders = {
        writing: quantize_onnx(
            pruned,
            tmp_path / writing,
            Quantization(scheme=scheme, block_size=block_size, rounding=rounding, writing=writing, head=True),
            calibration=tokens,
        )
        for writing in ("ort", "tensorrt")
    }
    (graph,) = open_folder(pruned)
    wide = [linear for linear in graph.linears if min(linear.K, linear.N) >= 16]
    for linear in wide:
        K, bits = linear.K, int(scheme[1])
        by_writing = [stored_weight(result.path, linear, wide) for result in folders.values()]
        np.testing.assert_array_equal(by_writing[0], by_writing[1][:K])
        assert not by_writing[1][K:].any()  # what fills up the last block
        if rounding == "plain":
            block = K if bits == 8 else block_size
            expected = round_weight(linear.read_weight(), bits=bits, block_size=block).dequantized()
            np.testing.assert_array_equal(by_writing[0], expected)
    yardstick = Yardstick(Runner(pruned).logits, tokens)
    for result in folders.values():
        assert result.coverage.found == result.coverage.promised == len(wide)
    apart, together = len(wide), len({linear.x for linear in wide})
    assert folders["tensorrt"].coverage.operators == {"MatMulNBits": apart}
    assert folders["ort"].coverage.operators == {"MatMulNBits": together} and together < apart
    for result in folders.values():
        assert json.loads((result.path / "quantization.json").read_text()) == result.record
        assert yardstick.divergence(Runner(result.path).logits) < KL_AT_MOST[scheme]
    assert folders["ort"].record["weights_bytes"] < 0.75 * folders["ort"].record["float_bytes"]


@pytest.mark.parametrize("scheme", ["w8", "w4"])
def test_runtimes_compute_with_these_numbers(
    pruned: Path, tmp_path: Path, tokens: NDArray[np.int64], scheme: str
) -> None:
    """In float arithmetic the quantized graph equals the float graph with the rounded weights in it."""
    folder = quantize_onnx(
        pruned, tmp_path / "q", Quantization(scheme=scheme, rounding="search", head=True)
    ).path
    (graph,) = open_folder(pruned)
    embedding = next(linear for linear in graph.linears if linear.role == "head").weight
    for linear in graph.linears:
        if min(linear.K, linear.N) >= 16 and linear.weight is not embedding:
            rounded = stored_weight(folder, linear, graph.linears)
            graph.rewrite(linear.weight, lambda _, rounded=rounded: rounded)
    write_folder(pruned, tmp_path / "float", [graph])
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    exact = tmp_path / "exact"
    exact.mkdir()
    onnx.save(model, exact / "model.onnx")
    last = "hidden_states.2"  # the head differs: there the float folder keeps the tied embedding
    expected, found = (session_outputs(path, tokens, [last])[last] for path in (tmp_path / "float", exact))
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_each_linear_is_fitted_to_the_inputs_that_it_will_have(
    pruned: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    seen: dict[str, NDArray[np.float32]] = {}
    rounded: dict[str, NDArray[np.float32]] = {}

    def rounding(group: Sequence[Linear], hessian: NDArray[np.float32]) -> list[RoundedWeight]:
        found = [round_weight(linear.read_weight(), bits=4, block_size=32) for linear in group]
        for linear, result in zip(group, found, strict=True):
            seen[linear.name], rounded[linear.name] = hessian, result.dequantized()
        return found

    (graph,) = open_folder(pruned)
    prompts = [{"input_ids": window[None]} for window in tokens]
    round_layerwise(graph, graph.linears, prompts, rounding)
    names = [linear.name for linear in graph.linears]
    assert list(seen) == list(rounded) == names  # every linear once, in the order of the computation
    for target in (names[0], names[3], names[9], names[13], names[20]):  # q; o; k, up, down of later layers
        (partly,) = open_folder(pruned)
        group = next(linear for linear in partly.linears if linear.name == target)
        for linear in partly.linears:
            if linear.x is group.x:
                break
            partly.rewrite(linear.weight, lambda _, weight=rounded[linear.name]: weight)
        write_folder(pruned, tmp_path / "partly", [partly])
        name = str(group.x.name)
        x = session_outputs(tmp_path / "partly", tokens, [name])[name].reshape(-1, group.K)
        np.testing.assert_allclose(seen[target], x.T @ x, rtol=1e-3, atol=1e-4 * np.abs(x.T @ x).max())


def test_calibrated_rounding_is_nearer(llama: Path, tmp_path: Path) -> None:
    windows = np.random.default_rng(0).integers(3, 272, size=(40, 24))
    calibration, unseen = windows[:30], windows[30:]
    yardstick = Yardstick(Runner(llama).logits, unseen)
    kl = {}
    for rounding in ("plain", "search", "gptq"):
        result = quantize_onnx(
            llama, tmp_path / rounding, Quantization(scheme="w4", rounding=rounding), calibration=calibration
        )
        kl[rounding] = yardstick.divergence(Runner(result.path).logits)
        assert result.record["weights"]["rounding"] == rounding
        assert (result.record["calibration"] is not None) == (rounding == "gptq")
    assert kl["search"] < kl["plain"] and kl["gptq"] < 0.8 * kl["plain"]
    default = quantize_onnx(llama, tmp_path / "default", Quantization(scheme="w4"), calibration=calibration)
    assert default.record["weights"]["rounding"] == "gptq"
    assert (
        quantize_onnx(llama, tmp_path / "bare", Quantization(scheme="w4")).record["weights"]["rounding"]
        == "search"
    )


@pytest.mark.parametrize("flavor", ["portable", "gqa"])
@pytest.mark.parametrize("scheme", ["int8", "w8", "w4"])
def test_genai_and_ort_generate_the_same(
    tmp_path: Path, tokens: NDArray[np.int64], scheme: str, flavor: str
) -> None:
    needs("onnxruntime_genai")
    checkpoint = write_tiny(tmp_path / "dense", "qwen2", head_dim=HEAD_DIM)
    slice_checkpoint(Checkpoint.open(checkpoint), plan_for(checkpoint), tmp_path / "pruned")
    source = onnx_from_checkpoint(Checkpoint.open(tmp_path / "pruned"), tmp_path / "onnx", flavor=flavor).path
    calibration = tokens if scheme == "int8" else None
    folder = quantize_onnx(
        source,
        tmp_path / "q",
        Quantization(scheme=scheme, smooth=0.5, head=True, block_size=16),
        calibration=calibration,
    ).path
    decoder = OrtDecoder(folder)
    generate = GenaiModel(folder).generate
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(3, 272, size=(1, 6))
        found = generate(prompt, 12)
        stops = frozenset({2})
        wanted = greedy_tokens(decoder, prompt, max_new_tokens=12, eos_token_ids=stops)
        assert found == [token for token in wanted if token not in stops]


@pytest.mark.parametrize("writing", ["ort", "tensorrt"])
@pytest.mark.parametrize(("flavor", "dtype"), [("gqa", "fp16"), ("gqa", "fp32"), ("static-cache", "fp16")])
def test_every_flavor_and_dtype(
    tmp_path: Path, tokens: NDArray[np.int64], flavor: str, dtype: str, writing: str
) -> None:
    checkpoint = write_tiny(tmp_path / "dense", "qwen3", head_dim=HEAD_DIM)
    cache_tokens = 64 if flavor == "static-cache" else None
    source = onnx_from_checkpoint(
        Checkpoint.open(checkpoint), tmp_path / "onnx", flavor=flavor, dtype=dtype, cache_tokens=cache_tokens
    ).path
    result = quantize_onnx(
        source, tmp_path / "q", Quantization(scheme="w4", writing=writing), calibration=tokens
    )
    assert result.coverage.found == result.coverage.promised == 21
    expected, found = (OrtDecoder(folder).prefill(tokens[:2])[0] for folder in (source, result.path))
    assert np.abs(found - expected).max() < 0.5 * np.abs(expected).max()


def test_bf16_for_tensorrt_without_running_it(tmp_path: Path) -> None:
    """No CPU kernel computes bf16: the numbers are checked in the file."""
    checkpoint = write_tiny(tmp_path / "dense", "llama-tied")
    source = onnx_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / "onnx", dtype="bf16").path
    (graph,) = open_folder(source)
    linear = graph.linears[0]
    bfloat16 = linear.dtype.numpy()
    rounded = round_weight(linear.read_weight(), bits=4, block_size=32, scale_dtype=bfloat16)
    assert rounded.scales.dtype == bfloat16
    assert np.abs(rounded.dequantized() - linear.read_weight()).max() < rounded.scales.astype("f4").max()


def test_tensorrt_builds_the_tensorrt_writing(llama: Path, tmp_path: Path) -> None:
    trt = needs("tensorrt_rtx")
    for scheme in ("w8", "w4"):
        folder = quantize_onnx(
            llama,
            tmp_path / scheme,
            Quantization(scheme=scheme, writing="tensorrt", head=True, rounding="plain"),
        ).path
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network()
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(folder / "model.onnx")), parser.get_error(0).desc()
        stored = {network.get_layer(i).type for i in range(network.num_layers)}
        assert trt.LayerType.DEQUANTIZE in stored


def test_a_head_stays_float_unless_it_is_asked_for(llama: Path, tmp_path: Path) -> None:
    for head in (False, True):
        result = quantize_onnx(llama, tmp_path / str(head), Quantization(scheme="w4", head=head))
        assert ("lm_head" in result.record["linears"]) is head
        assert result.coverage.promised == 21 + head


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "w3"}, r"Unknown scheme 'w3'\. Did you mean"),
        ({"scheme": "w4", "block_size": 48}, r"one of 16, 32, 64, 128, 256, got 48\.\n--block-size 32"),
        ({"scheme": "w4", "rounding": "gptq"}, r"none were given\.\n--calib FILE, or --rounding search"),
        ({"scheme": "w4", "rounding": "greedy"}, "Unknown rounding 'greedy'"),
        ({"scheme": "w8", "writing": "tensort"}, "Unknown writing 'tensort'. Did you mean 'tensorrt'"),
    ],
)
def test_bad_options_are_refused(llama: Path, tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(NirvanaError, match=words):
        quantize_onnx(llama, tmp_path / "q", Quantization(**options))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_windows_without_a_prompt_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match="windows of 1 token say nothing"):
        quantize_onnx(llama, tmp_path / "q", Quantization(scheme="w4"), calibration=np.full((3, 1), 5))
    assert list(tmp_path.iterdir()) == []


def test_the_command_rounds_weights(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "w4"
    command = ["quantize", str(llama), "--scheme", "w4", "--out", str(out), "--head"]
    told = CliRunner().invoke(commands, [*command, "--block-size", "64", "--writing", "tensorrt", "--json"])
    assert told.exit_code == 0, told.output
    record = json.loads(told.stdout)
    expected = {"bits": 4, "block_size": 64, "rounding": "search", "writing": "tensorrt", "head": True}
    assert record["weights"] == expected
    assert {finding["rule"] for finding in record["tensorrt_findings"]} == {"attention-precision"}  # fp32
    assert record["weights_bytes"] < record["float_bytes"]
    refused = CliRunner().invoke(commands, [*command, "--force", "--rounding", "gptq"])
    assert isinstance(refused.exception, NirvanaError) and "none were given" in str(refused.exception)
    assert (out / "quantization.json").is_file()  # the folder before is untouched
    again = CliRunner().invoke(
        commands,
        ["quantize", str(out), "--scheme", "w4", "--calib", "lost.txt", "--out", str(tmp_path / "q")],
    )
    assert "is quantized already" in str(again.exception)  # before the text is looked for


def test_what_is_quantized_already_is_refused(llama: Path, tmp_path: Path) -> None:
    once = quantize_onnx(llama, tmp_path / "once", Quantization(scheme="w4")).path
    with pytest.raises(NirvanaError, match=r"is quantized already: node .* is a MatMulNBits"):
        quantize_onnx(once, tmp_path / "twice", Quantization(scheme="w8"))


@pytest.mark.parametrize("scheme", ["int8", "w4"])
def test_weights_are_read_where_a_file_has_two_names(scheme: str, llama: Path, tmp_path: Path) -> None:
    """The folders of a search share the files of the dense model."""
    made, windows = [], np.random.default_rng(0).integers(3, 272, size=(8, 24))
    take(llama, tmp_path / "linked")
    for source in (llama, tmp_path / "linked"):
        out = tmp_path / f"quantized-{len(made)}"
        quantize_onnx(source, out, Quantization(scheme=scheme), calibration=windows)
        made.append({file.name: file.read_bytes() for file in out.iterdir() if file.suffix != ".json"})
    assert (tmp_path / "linked/model.onnx.data").stat().st_nlink > 1
    assert made[0] == made[1]


def test_a_graph_of_small_linears_is_refused(tmp_path: Path) -> None:
    source = write_tiny_decoder(tmp_path / "onnx")
    with pytest.raises(NirvanaError, match="No linear has at least 16 inputs and outputs"):
        quantize_onnx(source, tmp_path / "q", Quantization(scheme="w4"))


@pytest.mark.parametrize(("value", "words"), [(0.0, "zero throughout"), (np.nan, "NaN or infinite")])
def test_useless_activations_are_refused(
    llama: Path, tmp_path: Path, tokens: NDArray[np.int64], value: float, words: str
) -> None:
    (graph,) = open_folder(llama)
    norm = graph.model.graph.initializers["model.layers.1.input_layernorm.weight"]
    graph.rewrite(norm, lambda scale: np.full_like(scale, value))
    write_folder(llama, tmp_path / "odd", [graph])
    with pytest.raises(
        NirvanaError, match=rf"model\.layers\.1\.self_attn\.q_proj are {words}.*\n.*--rounding"
    ):
        quantize_onnx(tmp_path / "odd", tmp_path / "q", Quantization(scheme="w4"), calibration=tokens)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("flavor", ["portable", "gqa", "static-cache"])
@pytest.mark.parametrize(("scheme", "writing"), [("int8", "ort"), ("w8", "tensorrt"), ("w4", "ort")])
def test_layer_by_layer_counts_what_the_whole_graph_gives(
    tmp_path: Path, tokens: NDArray[np.int64], scheme: str, writing: str, flavor: str
) -> None:
    checkpoint = write_tiny(tmp_path / "dense", "qwen2", head_dim=HEAD_DIM)
    slice_checkpoint(Checkpoint.open(checkpoint), plan_for(checkpoint), tmp_path / "pruned")
    cache_tokens = 64 if flavor == "static-cache" else None
    source = onnx_from_checkpoint(
        Checkpoint.open(tmp_path / "pruned"), tmp_path / "onnx", flavor=flavor, cache_tokens=cache_tokens
    ).path
    result = quantize_onnx(
        source,
        tmp_path / "q",
        Quantization(scheme=scheme, writing=writing, smooth="none", head=True),
        calibration=tokens,
    )
    path = result.path / "model.onnx"
    session_of(onnx.load(path, load_external_data=False), result.path, optimized=tmp_path / "whole.onnx")
    whole = Counter(
        node.op_type
        for node in onnx.load(tmp_path / "whole.onnx", load_external_data=False).graph.node
        if node.op_type in SCHEMES[scheme].integer_kernels
    )
    packed = flavor == "gqa" if scheme == "int8" else writing == "ort"
    assert result.coverage.operators == whole and sum(whole.values()) == 1 + 3 * (4 if packed else 7)
    assert result.coverage.found == result.coverage.promised == 22


def test_values_of_one_layer_at_a_time_are_those_of_the_whole_graph(
    tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    """gqa too, where a layer's last sum and the next one's norm are one operator."""
    checkpoint = write_tiny(tmp_path / "dense", "qwen2", head_dim=HEAD_DIM)
    for flavor in ("portable", "gqa"):
        source = onnx_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / flavor, flavor=flavor).path
        (graph,) = open_folder(source)
        names = sorted({str(linear.x.name) for linear in graph.linears})
        expected = session_outputs(source, tokens[:1], names)
        cut = Cut(source / "model.onnx")
        assert len(cut.ends) == 4
        found = {
            name: value
            for _, values in cut.run([{"input_ids": tokens[:1]}], names)
            for name, value in values.items()
        }
        assert found.keys() == set(names)
        for name in names:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


def _memory_record(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What benchmarks/quantize_memory.py found; it promises a peak of at most 6 GB, whatever the depth."""
    script = ROOT / "benchmarks" / "quantize_memory.py"
    command = [sys.executable, str(script), *arguments, "--folder", str(tmp_path)]
    file = tmp_path / "record.json"
    run = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    [record] = json.loads(file.read_text())["measured"].values()
    found: dict[str, Any] = record
    return found


@pytest.mark.slow
def test_memory_of_a_deep_tiny_model_is_that_of_a_shallow_one(tmp_path: Path) -> None:
    options = ["--scheme", "int8", "--smooth", "0.7", "--dtype", "fp32"]
    record = _memory_record(tmp_path, "tiny", "--layers", "2", "64", *options)
    shallow, deep = record["runs"]
    assert (shallow["layers"], deep["layers"]) == (2, 64)
    assert deep["coverage"].startswith("449/449 linears")
    more_bytes = deep["float_bytes"] - shallow["float_bytes"]
    assert more_bytes > 2 * 0.1 * shallow["peak_rss_bytes"]  # held in memory, they would break the promise
    assert record["promise"]["kept"] == {"peak": True, "depth": True}


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--scheme", "w4"], ["--scheme", "int8", "--smooth", "0.7", "--dtype", "fp32"]]
)
def test_memory_does_not_grow_with_depth(tmp_path: Path, options: list[str]) -> None:
    record = _memory_record(tmp_path, "1b", "--layers", "2", "6", *options)
    assert all(record["promise"]["kept"].values()), record
