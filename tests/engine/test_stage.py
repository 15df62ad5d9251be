"""Engines of output folders and of ONNX folders: quantized ones, encoder-decoders, by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from builders.engines import CACHE_TOKENS, LENGTHS, SMALL, exported, network_of, plan_of, write_model
from builders.extras import needs
from builders.quantized import inputs_of
from builders.tiny_t5 import write_t5
from click.testing import CliRunner

from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.cli.main import commands
from nirvana_deploy.engine.drop_branch import drop_cache_branch
from nirvana_deploy.engine.from_checkpoint import engines_from_checkpoint
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.layout import DECODER_FILE
from nirvana_deploy.pipeline.prune_export import prune_by_plan
from nirvana_deploy.prune.plan_file import write_plan
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.graph.linears import open_folder, write_folder
from nirvana_deploy.quantize.int8.decide import apply_to
from nirvana_deploy.quantize.int8.spec import Int8Spec, read_spec
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.rewriting import QuantizeInputs
from nirvana_deploy.quantize.schemes import SCHEMES
from nirvana_deploy.quantize.weights.fp8 import round_to_fp8
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.tensorrt.record import read_engine_record

trt = needs("tensorrt_rtx")
pytestmark = pytest.mark.integration
SIZES = ["--max-batch", "2", "--max-length", str(CACHE_TOKENS), "--opt-prompt", "16", "--target", "sm86"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("engines") / "dense", "qwen3")


@pytest.fixture(scope="module")
def output(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder of this tool, with a checkpoint and without ONNX."""
    folder = tmp_path_factory.mktemp("output")
    write_plan(plan_of(dense), folder / "plan.json")
    prune_by_plan(str(dense), plan=folder / "plan.json", out=folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def spec(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Int8Spec:
    """The int8 decision, made on the float32 ONNX."""
    folder = tmp_path_factory.mktemp("int8")
    tokens = np.random.default_rng(0).integers(3, 272, size=(4, 24))
    onnx_from_checkpoint(Checkpoint.open(output / "checkpoint"), folder / "onnx")
    quantize_onnx(
        folder / "onnx", output / "onnx-int8", Quantization(scheme="int8", smooth=0.5), calibration=tokens
    )
    return read_spec(output / "onnx-int8")


def run(*arguments: str | Path) -> Any:
    """One command; the exception that the console script would turn into a sentence is raised."""
    result = CliRunner().invoke(commands, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_an_output_folder_gets_an_engine(output: Path) -> None:
    result = run("build-engine", output, *SIZES, "--json")
    (engine,) = json.loads(result.stdout)["engines"]
    path = output / "engine" / "pruned.engine"
    assert engine["path"] == str(path) and engine["dtype"] == "fp16" and engine["kv"] == "concat"
    stage = json.loads((output / "manifest.json").read_text())["stages"]["engine-pruned"]
    assert stage["files"]["engine/pruned.engine"] == sha256_of(path) == engine["engine_sha256"]
    assert "engine/pruned.json" in stage["files"] and "engine/pruned-onnx/model.onnx" in stage["files"]
    shown = run("inspect", path).stdout
    assert "2 ATTENTION_INPUT" in shown and "profile 1, decode" in shown and "tensorrt_rtx --onnx=" in shown
    assert json.loads(run("inspect", path, "--json").stdout)["engine_sha256"] == engine["engine_sha256"]
    with pytest.raises(NirvanaError, match=r"pruned\.engine exists already\.\nPass --force"):
        run("build-engine", output, *SIZES)


def test_an_engine_in_place_of_the_dense_model(output: Path, spec: Int8Spec) -> None:
    options = ["--variant", "dense", "--kv", "in-place", "--dtype", "bf16"]
    result = run("build-engine", output, *SIZES, *options)
    assert "cache in-place\n" in result.stdout and "4 KV_CACHE_UPDATE" in result.stdout
    record = read_engine_record(output / "engine" / "dense-bf16-in-place.engine")
    assert record.inputs[2].shape == (None, 3, CACHE_TOKENS, 16)


@pytest.mark.parametrize(
    ("scheme", "kv", "dequantize", "quantize"),
    [("int8", "concat", 28, 14), ("w8", "in-place", 14, 0), ("w4", "concat", 14, 0)],
)
def test_quantized_engines_store_integers(
    output: Path, spec: Int8Spec, tmp_path: Path, scheme: str, kv: str, dequantize: int, quantize: int
) -> None:
    (engine,) = engines_from_checkpoint(
        Checkpoint.open(output / "checkpoint"),
        tmp_path,
        name="q",
        kv=kv,
        quantize=inputs_of(spec) if scheme == "int8" else QuantizeInputs(Quantization(scheme=scheme)),
        lengths=LENGTHS,
        options=SMALL,
    )
    record = engine.record
    assert record.quantization == scheme and record.dtype == "fp16" and record.notes == ()
    assert record.layers["DEQUANTIZE"] == dequantize and record.layers.get("QUANTIZE", 0) == quantize
    assert record.layers["ATTENTION_INPUT"] == 2 and engine.check.linears >= 15
    assert any("quantized" in name or "scale" in name for name in engine.check.compared_values)
    assert not list(tmp_path.glob(".*"))


def test_int8_without_decisions_names_the_command(output: Path, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"(?s)ranges of its activations.*quantize OUT --scheme int8"):
        engines_from_checkpoint(
            Checkpoint.open(output / "checkpoint"),
            tmp_path,
            name="q",
            quantize=QuantizeInputs(Quantization(scheme="int8")),
        )
    with pytest.raises(NirvanaError, match="not in fp32"):
        engines_from_checkpoint(
            Checkpoint.open(output / "checkpoint"),
            tmp_path,
            name="q",
            quantize=QuantizeInputs(Quantization(scheme="w4")),
            dtype="fp32",
        )
    with pytest.raises(
        NirvanaError, match=r"(?s)needs one of sm89, .*, and sm86 has no kernels.*--target sm89,"
    ):
        engines_from_checkpoint(
            Checkpoint.open(output / "checkpoint"),
            tmp_path,
            name="q",
            quantize=QuantizeInputs(Quantization(scheme="fp8")),
            options=SMALL,
        )
    with pytest.raises(NirvanaError, match="Unknown KV form 'paged'"):
        engines_from_checkpoint(Checkpoint.open(output / "checkpoint"), tmp_path, name="q", kv="paged")


def test_an_onnx_folder_is_built_as_it_is(dense: Path, tmp_path: Path) -> None:
    folder = exported(dense, tmp_path / "mine")
    result = run("build-engine", folder, *SIZES, "--weight-streaming", "--workspace", "1GiB")
    record = read_engine_record(folder / "engine" / "mine.engine")
    assert record.weight_streaming and record.workspace_bytes == 1 << 30
    assert "weight streaming" in result.stdout and "--memPoolSize=workspace:1024M" in record.trtexec
    with pytest.raises(NirvanaError, match="its ONNX file already settles --kv"):
        run("build-engine", folder, *SIZES, "--kv", "in-place", "--force")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "sm70"], "Unknown target sm70"),
        (["--max-length", "100000"], "longer than the model's context of 512 tokens"),
        (["--opt-batch", "9"], "minimum <= optimum <= maximum"),
        (["--engine", "tensorrt", "--target", "sm80"], "takes no targets"),
        (["--out", "elsewhere"], "lies in it"),
        (["--quantize", "int8", "--variant", "dense"], "ranges of its activations"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_requests_are_sentences(output: Path, options: list[str], message: str) -> None:
    with pytest.raises(NirvanaError, match=message):
        run("build-engine", output, "--name", "bad", *options)


def test_sizes_are_bytes() -> None:
    result = CliRunner().invoke(commands, ["build-engine", ".", "--workspace", "many"])
    assert result.exit_code == 2 and "write 300MB, 2GB, or 512MiB" in result.output


@pytest.mark.parametrize("kind", ["t5", "flan-t5"])
def test_an_encoder_decoder_gives_two_engines(tmp_path: Path, kind: str) -> None:
    checkpoint = write_t5(tmp_path / "model", kind)
    encoder, decoder = engines_from_checkpoint(
        Checkpoint.open(checkpoint), tmp_path / "out", name="t5", lengths=LENGTHS, options=SMALL
    )
    assert (encoder.record.part, decoder.record.part) == ("encoder", "decoder")
    assert encoder.record.layers["ATTENTION_INPUT"] == 3 and decoder.record.layers["ATTENTION_INPUT"] == 4
    assert [profile.name for profile in encoder.record.profiles] == ["encoder"]
    first, later = decoder.record.profiles
    name = "past_key_values.0.encoder.key"
    assert first.shapes[name] == ((1, 5, 0, 8), (1, 5, 0, 8), (2, 5, 0, 8))
    assert later.shapes[name] == ((1, 5, 1, 8), (1, 5, 16, 8), (2, 5, CACHE_TOKENS, 8))
    assert "use_cache_branch" not in {one.name for one in decoder.record.inputs}
    with pytest.raises(NirvanaError, match="not updated in place"):
        engines_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / "out", name="t5", kv="in-place")


def test_the_rewritten_decoder_computes_what_the_exported_one_does(tmp_path: Path) -> None:
    """First step from an empty cache, later step from a full one; the branch input is gone."""
    folder = tmp_path / "onnx"
    onnx_from_checkpoint(Checkpoint.open(write_t5(tmp_path / "model", "flan-t5")), folder)
    path, rng = folder / DECODER_FILE, np.random.default_rng(0)

    def session() -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def feeds(inputs: list[Any], past: int, encoder_past: int) -> dict[str, Any]:
        lengths = {"past_decoder_sequence_length": past, "past_encoder_sequence_length": encoder_past}
        sizes = {"batch_size": 2, "encoder_sequence_length": 6, "decoder_sequence_length": 1, **lengths}
        given: dict[str, Any] = {}
        for one in inputs:
            shape = [d if isinstance(d, int) else sizes[d] for d in one.shape]
            if one.name == "input_ids":
                given[one.name] = np.full(shape, 7)
            elif one.name == "encoder_attention_mask":
                given[one.name] = np.array([[1] * 6, [1] * 4 + [0] * 2])
            elif one.name == "use_cache_branch":
                given[one.name] = np.array([past > 0])
            else:
                given[one.name] = rng.normal(size=shape).astype(np.float32)
        return given

    before = session()
    cases = [feeds(before.get_inputs(), 0, 0), feeds(before.get_inputs(), 3, 6)]
    expected = [before.run(None, case) for case in cases]
    drop_cache_branch(path)
    after = session()
    assert len(after.get_inputs()) == len(before.get_inputs()) - 1
    for case, outputs in zip(cases, expected, strict=True):
        del case["use_cache_branch"]
        for found, wanted in zip(after.run(None, case), outputs, strict=True):
            np.testing.assert_array_equal(found, wanted)
    drop_cache_branch(path)  # nothing left to do


def test_a_branch_used_otherwise_is_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.BOOL, [1])
    node = onnx.helper.make_node("Not", ["use_cache_branch"], ["y"])
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [out])), tmp_path / "x.onnx"
    )
    with pytest.raises(NirvanaError, match="used otherwise"):
        drop_cache_branch(tmp_path / "x.onnx")


def test_both_runtimes_quantize_by_the_same_rules(output: Path, spec: Int8Spec, tmp_path: Path) -> None:
    """Activations per tensor, weights per output channel, zero points 0; ties go to even, as in TensorRT."""
    onnx_from_checkpoint(Checkpoint.open(output / "checkpoint"), tmp_path / "float", dtype="fp16")
    graphs = open_folder(tmp_path / "float")
    apply_to(graphs, spec)
    write_folder(tmp_path / "float", tmp_path / "int8", graphs)
    network, _alive = network_of(tmp_path / "int8" / "model.onnx")
    kinds = {trt.LayerType.QUANTIZE: trt.IQuantizeLayer, trt.LayerType.DEQUANTIZE: trt.IDequantizeLayer}
    seen = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in kinds:
            layer.__class__ = kinds[layer.type]
            scale = tuple(layer.get_input(1).shape)
            assert scale == () or (len(scale) == 1 and layer.axis == 1)
            assert layer.get_input(1).dtype == trt.DataType.HALF
            seen += 1
    assert seen == 3 * len(spec.linears)
    model = onnx.load(tmp_path / "int8" / "model.onnx")
    zero_points = [t for t in model.graph.initializer if t.name.endswith("zero_point")]
    assert len(zero_points) == 2 * len(spec.linears)
    assert not any(onnx.numpy_helper.to_array(tensor).any() for tensor in zero_points)
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [6])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT8, [6])
    constants = [
        onnx.numpy_helper.from_array(np.array(0.5, np.float32), "s"),
        onnx.numpy_helper.from_array(np.array(0, np.int8), "z"),
    ]
    graph = onnx.helper.make_graph([node], "g", [x], [y], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.array([0.25, 0.75, -0.25, -0.75, 100, -100], np.float32)})
    assert found.tolist() == [0, 2, 0, -2, 127, -128]


def test_fp8_weights_build_for_ada_and_newer(output: Path, tmp_path: Path) -> None:
    (engine,) = engines_from_checkpoint(
        Checkpoint.open(output / "checkpoint"),
        tmp_path,
        name="q",
        quantize=QuantizeInputs(Quantization(scheme="fp8")),
        lengths=LENGTHS,
    )
    record = engine.record
    assert (record.quantization, record.targets) == ("fp8", SCHEMES["fp8"].engine_targets)
    assert record.layers["DEQUANTIZE"] == 14 and record.layers["ATTENTION_INPUT"] == 2
    # the file that was built computes the model, up to the rounding of its weights
    exported = onnx_from_checkpoint(
        Checkpoint.open(output / "checkpoint"), tmp_path / "float", dtype="fp16"
    ).path
    tokens = np.random.default_rng(0).integers(3, 272, size=(2, 9))
    expected, _ = OrtDecoder(exported).prefill(tokens)
    found, _ = OrtDecoder(tmp_path / "q-onnx").prefill(tokens)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert np.abs(found - expected).max() > 0


def test_fp8_codes_are_the_nearest() -> None:
    weight = np.array([[448.0, 0.0], [17.0, 0.0], [-300.0, 0.0]], dtype=np.float32)
    codes, scale = round_to_fp8(weight, np.dtype(np.float32))
    assert scale[0] == 1.0 and scale[1] > 0
    # 3 bits of mantissa: 17 lies between 16 and 18, the tie goes to even; 300 between 288 and 320
    assert codes.astype(np.float32)[:, 0].tolist() == [448.0, 16.0, -288.0]
    assert not codes.astype(np.float32)[:, 1].any()


def test_lengths_are_refused_before_the_export(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NirvanaError, match="longer than the model's context of 512 tokens"):
        run("build-engine", output, "--name", "long", "--max-length", "513")
    assert "Writing" not in capsys.readouterr().err and not list((output / "engine").glob("*long*"))


def test_a_checkpoint_is_not_taken_for_an_onnx_folder(output: Path) -> None:
    checkpoint = output / "checkpoint"
    with pytest.raises(NirvanaError, match=r"(?s)it is a checkpoint.*export \S+/checkpoint --out \S+-onnx"):
        run("build-engine", checkpoint)
    assert not (checkpoint / "engine").exists()


def test_int8_names_the_folder_that_it_lacks(output: Path) -> None:
    wanted = rf"(?s)from {output}/dense/onnx-int8, which is not there.*quantize {output}/dense/onnx --scheme"
    with pytest.raises(NirvanaError, match=wanted):
        run("build-engine", output, "--variant", "dense", "--quantize", "int8", "--name", "q")
