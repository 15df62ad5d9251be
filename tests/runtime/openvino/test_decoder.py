from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders.extras import needs
from builders.tiny import VOCABULARY, write_tiny
from builders.tiny_decoder import write_tiny_decoder
from builders.tiny_t5 import write_t5

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.openvino.decoder import OpenVinoDecoder
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.runner import Runner, greedy_tokens
from nirvana_deploy.runtime.torch import open_checkpoint

openvino = needs("openvino")

CPU = "openvino-cpu"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("openvino") / "model"
    return Checkpoint.open(write_tiny(folder, "llama-tied", head_dim=16))


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openvino") / "onnx"
    onnx_from_checkpoint(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def decoder(folder: Path) -> OpenVinoDecoder:
    return OpenVinoDecoder(folder, runtime=CPU, threads=1)


def answers(runner: Runner, prompts: np.ndarray[Any, Any]) -> list[list[int]]:
    return [greedy_tokens(runner, prompt[None], max_new_tokens=16) for prompt in prompts]


def kl_between(one: Runner, other: Runner, windows: np.ndarray[Any, Any]) -> float:
    """Mean over positions of KL(one || other), nats per token."""
    logs = []
    for runner in (one, other):
        logits = runner.prefill(windows)[0].astype(np.float64)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        logs.append(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1).mean())


@pytest.mark.consumer(
    "OpenVINO",
    artifact="ONNX folder, fp32",
    proof="greedy tokens equal torch's and ONNX Runtime's",
    package="openvino",
)
def test_greedy_tokens_equal_those_of_torch_and_of_onnx_runtime(
    checkpoint: Checkpoint, folder: Path, decoder: OpenVinoDecoder, tokens: np.ndarray[Any, Any]
) -> None:
    with OrtDecoder(folder, threads=1) as ort, open_checkpoint(checkpoint.path, threads=1) as torch:
        assert answers(decoder, tokens) == answers(ort, tokens) == answers(torch, tokens)


def test_layers_of_different_widths_run(tmp_path: Path) -> None:
    folder = write_tiny_decoder(tmp_path)
    prompt = np.array([[3, 1, 4, 1, 5, 9, 2]])
    with OrtDecoder(folder, threads=1) as ort, OpenVinoDecoder(folder, runtime=CPU, threads=1) as runner:
        np.testing.assert_allclose(runner.prefill(prompt)[0], ort.prefill(prompt)[0], atol=1e-4)
        assert answers(runner, prompt) == answers(ort, prompt)


def test_a_left_padded_batch_decodes_as_in_onnx_runtime(
    folder: Path, decoder: OpenVinoDecoder, tokens: np.ndarray[Any, Any]
) -> None:
    mask = np.ones_like(tokens[:3])
    mask[0, :15], mask[1, :4] = 0, 0
    found, state = decoder.prefill(tokens[:3], mask)
    with OrtDecoder(folder, threads=1) as ort:
        expected, other = ort.prefill(tokens[:3], mask)
        real = mask.astype(bool)
        np.testing.assert_allclose(found[real], expected[real], atol=1e-4)
        for step in range(4):
            found, state = decoder.decode(tokens[3:, step : step + 1], state)
            expected, other = ort.decode(tokens[3:, step : step + 1], other)
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_continuing_a_state_again_forgets_what_followed(
    decoder: OpenVinoDecoder, tokens: np.ndarray[Any, Any]
) -> None:
    _, begun = decoder.prefill(tokens[:1])
    first, after = decoder.decode(tokens[1:2, :1], begun)
    kept = first.copy()
    decoder.decode(tokens[1:2, 1:2], after)
    again, _ = decoder.decode(tokens[1:2, :1], begun)
    np.testing.assert_array_equal(again, kept)
    np.testing.assert_array_equal(first, kept)  # a later step does not write over returned logits
    with pytest.raises(NirvanaError, match="was written over"):
        decoder.decode(tokens[1:2, 1:2], after)


def test_two_prompts_do_not_share_a_cache(decoder: OpenVinoDecoder, tokens: np.ndarray[Any, Any]) -> None:
    _, one = decoder.prefill(tokens[:1])
    _, other = decoder.prefill(tokens[1:2])
    found, _ = decoder.decode(tokens[2:3, :1], one)
    decoder.decode(tokens[2:3, :1], other)
    alone = decoder.prefill(np.concatenate([tokens[:1], tokens[2:3, :1]], axis=1))[0]
    np.testing.assert_allclose(found[:, -1], alone[:, -1], atol=1e-4)


def test_the_same_folder_opened_again_computes_the_same(
    folder: Path, decoder: OpenVinoDecoder, tokens: np.ndarray[Any, Any]
) -> None:
    """OpenVINO 2026.4.1 computes other logits from its cache of compiled models."""
    with OpenVinoDecoder(folder, runtime=CPU, threads=1) as again:
        np.testing.assert_array_equal(again.prefill(tokens)[0], decoder.prefill(tokens)[0])


def test_attention_and_cache_are_one_operator(decoder: OpenVinoDecoder) -> None:
    """Else every step copies the cache."""
    kinds = [
        node.get_rt_info()["layerType"].astype(str) for node in decoder._model.get_runtime_model().get_ops()
    ]
    assert kinds.count("ScaledDotProductAttention") == 3
    assert kinds.count("MemoryInput") == 6 and not {"Tile", "Softmax"} & set(kinds)


@pytest.mark.parametrize(("dtype", "allowed"), [("fp16", 0.01), ("bf16", 0.1)])
def test_half_precision_is_read_and_its_logits_are_float32(
    checkpoint: Checkpoint, tokens: np.ndarray[Any, Any], dtype: str, allowed: float, tmp_path: Path
) -> None:
    onnx_from_checkpoint(checkpoint, tmp_path, dtype=dtype)
    with (
        OpenVinoDecoder(tmp_path, runtime=CPU, threads=1) as runner,
        OrtDecoder(tmp_path, threads=1, in_float32=True) as exact,
    ):
        found, state = runner.prefill(tokens)
        expected, _ = exact.prefill(tokens)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < allowed * np.abs(expected).max()
        _, longer = runner.decode(tokens[:, :1], state)
        runner.decode(tokens[:, 1:2], longer)
        runner.decode(tokens[:, :1], state)


# quantized


@pytest.mark.parametrize(
    ("recipe", "weights", "most_kl"),
    [
        (Quantization(scheme="int8", smooth="none"), {"i8": 21}, 1e-6),
        (Quantization(scheme="w4", block_size=16, writing="tensorrt"), {"i4": 21}, 1e-2),
        (Quantization(scheme="w4", block_size=16, writing="tensorrt", head=True), {"i4": 22}, 1e-2),
        (Quantization(scheme="w8", writing="tensorrt"), {"i8": 21}, 1e-2),
    ],
    ids=["int8", "w4", "w4-head", "w8"],
)
def test_quantized_linears_run_in_integers_and_say_what_onnx_runtime_says(
    folder: Path,
    tokens: np.ndarray[Any, Any],
    recipe: Quantization,
    weights: dict[str, int],
    most_kl: float,
    tmp_path: Path,
) -> None:
    quantize_onnx(folder, tmp_path / "q", recipe, calibration=tokens if recipe.scheme == "int8" else None)
    with (
        OrtDecoder(tmp_path / "q", threads=1) as ort,
        OpenVinoDecoder(tmp_path / "q", runtime=CPU, threads=1) as runner,
    ):
        found = runner.linears()
        assert {kind: count for kind, count in found.items() if not kind.startswith("f")} == weights
        assert kl_between(ort, runner, tokens) < most_kl


def test_rows_that_end_within_a_block_run_in_float(folder: Path, tmp_path: Path) -> None:
    """MatMulNBits alone: 40 inputs of down_proj are two and a half blocks of 16."""
    quantize_onnx(folder, tmp_path / "q", Quantization(scheme="w4", block_size=16))
    with OpenVinoDecoder(tmp_path / "q", runtime=CPU, threads=1) as runner:
        assert runner.linears() == {"u4": 18, "f32": 4}  # the head is float anyway


# what is refused


def test_a_quantized_embedding_is_refused_with_what_works(folder: Path, tmp_path: Path) -> None:
    quantize_onnx(folder, tmp_path / "q", Quantization(scheme="w4", block_size=16, head=True))
    with pytest.raises(NirvanaError, match=r"looks up no embedding in .*\n.*--writing tensorrt"):
        OpenVinoDecoder(tmp_path / "q", runtime=CPU)


@pytest.mark.parametrize(("flavor", "options"), [("gqa", {}), ("static-cache", {"cache_tokens": 64})])
def test_other_flavors_are_refused_by_name(
    checkpoint: Checkpoint, flavor: str, options: dict[str, int], tmp_path: Path
) -> None:
    onnx_from_checkpoint(checkpoint, tmp_path, flavor=flavor, **options)
    with pytest.raises(NirvanaError, match=r"OpenVINO .*\n.*--flavor portable"):
        OpenVinoDecoder(tmp_path, runtime=CPU)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    onnx_from_checkpoint(Checkpoint.open(write_t5(tmp_path / "model", "t5")), tmp_path / "onnx")
    with pytest.raises(NirvanaError, match=r"holds an encoder-decoder.*\n.*onnxruntime-cpu"):
        open_runner(tmp_path / "onnx", runtime=CPU)


@pytest.mark.parametrize("device", ["gpu", "npu"])
def test_a_device_that_is_not_there_names_those_that_are(folder: Path, device: str) -> None:
    if any(name.startswith(device.upper()) for name in openvino.Core().available_devices):
        pytest.skip(f"says what happens without a {device.upper()}; this machine has one")
    with pytest.raises(NirvanaError, match=rf"sees no {device.upper()} on this machine; it sees CPU\.\n.*"):
        open_runner(folder, runtime=f"openvino-{device}")


def test_a_folder_that_is_no_model_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"holds no model\.onnx\.\n.*nirvana-deploy export"):
        OpenVinoDecoder(tmp_path, runtime=CPU)


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:500])
    with pytest.raises(NirvanaError, match=r"OpenVINO cannot load .*\n.*nirvana-deploy export"):
        OpenVinoDecoder(cut, runtime=CPU)
    shutil.copy(folder / "model.onnx", cut)
    (cut / "model.onnx.data").unlink()
    with pytest.raises(NirvanaError, match=r"model\.onnx\.data is missing beside it"):
        OpenVinoDecoder(cut, runtime=CPU)


def test_a_graph_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "negate", [x], [y])
    opset = [onnx.helper.make_opsetid("", 23)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(NirvanaError, match="not a decoder with a KV cache: its inputs are x,"):
        OpenVinoDecoder(tmp_path, runtime=CPU)


def test_a_newer_schema_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "newer")
    path = tmp_path / "newer" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(entry for entry in model.metadata_props if entry.key == "nirvana_deploy.schema").value = "99"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(NirvanaError, match="written with schema 99"):
        OpenVinoDecoder(tmp_path / "newer", runtime=CPU)


def test_tokens_beyond_the_vocabulary_and_the_context_are_refused(decoder: OpenVinoDecoder) -> None:
    with pytest.raises(NirvanaError, match=rf"Token id {VOCABULARY} is beyond"):
        decoder.prefill(np.array([[5, VOCABULARY]]))
    with pytest.raises(NirvanaError, match="context is 512 tokens, and 513 are asked for"):
        decoder.prefill(np.full((1, 513), 5))


def test_without_openvino_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[openvino\]"):
        open_runner(folder, runtime=CPU)


def test_the_command_line_generates_with_it(folder: Path) -> None:
    command = [sys.executable, "-m", "nirvana_deploy", "generate", str(folder), "--runtime", CPU]
    command += ["--prompt", "Hello", "--max-new-tokens", "4", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"({CPU})" in done.stderr
