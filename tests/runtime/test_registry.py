from __future__ import annotations

import importlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import onnxruntime
import pytest
from builders.extras import needs
from builders.fake_cuda import FakeDriver
from builders.fake_tensorrt import PASS_MS, decoder_profiles, fake_module, write_fake_engine
from builders.gpu import why_no_gpu
from click.testing import CliRunner
from transformers import LlamaTokenizer

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.cli.generate import generate
from nirvana_deploy.cli.main import commands
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.benchmark import device_times
from nirvana_deploy.measure.worker import RoundSample, WorkerProcess, serve
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.onnxruntime.providers import available, options_for, tensorrt_options
from nirvana_deploy.runtime.registry import open_runner, runtime_for
from nirvana_deploy.runtime.runner import greedy_tokens
from nirvana_deploy.runtime.table import RUNTIMES, Runtime
from nirvana_deploy.runtime.tensorrt.decoder import TensorRTRunner
from nirvana_deploy.runtime.tensorrt.record import read_engine_record
from nirvana_deploy.runtime.text import TextPieces, load_text_side, model_in, stream_text, tokenizer_folder


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runners") / "onnx"
    onnx_from_checkpoint(Checkpoint.open(tiny_llama), folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    profiles = decoder_profiles(folder, batch_size=2, step_tokens=12, total_tokens=40)
    path = tmp_path_factory.mktemp("engine") / "model.engine"
    return write_fake_engine(path, folder, profiles=profiles)


def fake_runner(engine: Path) -> TensorRTRunner:
    driver = FakeDriver()
    return TensorRTRunner(engine, driver=driver, module=fake_module(driver))


# the registry


def test_every_runtime_has_a_function_and_the_command_line_knows_it() -> None:
    [option] = [parameter for parameter in generate.params if parameter.name == "runtime"]
    assert isinstance(option.type, click.Choice) and tuple(option.type.choices) == tuple(RUNTIMES)
    for row in RUNTIMES.values():
        module, function = row.opens.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_runtime_follows_from_the_path(folder: Path, engine: Path) -> None:
    assert (runtime_for(folder), runtime_for(engine)) == ("onnxruntime-cpu", "tensorrt-rtx")
    with open_runner(folder, threads=1) as runner:
        assert (runner.runtime, runner.threads) == ("onnxruntime-cpu", 1)


def test_an_unknown_runtime_names_the_nearest(folder: Path) -> None:
    with pytest.raises(NirvanaError, match=r"Unknown runtime 'tensorrt-rxt'\. Did you mean 'tensorrt-rtx'"):
        open_runner(folder, runtime="tensorrt-rxt")


def test_a_runtime_does_not_take_what_another_runs(folder: Path, engine: Path) -> None:
    with pytest.raises(NirvanaError, match=r"tensorrt-rtx runs an engine file, .*\n.* build-engine .*rtx"):
        open_runner(folder, runtime="tensorrt-rtx")
    with pytest.raises(NirvanaError, match=r"onnxruntime-cpu runs an ONNX folder, and .* is none"):
        open_runner(engine, runtime="onnxruntime-cpu")


@pytest.mark.parametrize(
    "row",
    [row for row in RUNTIMES.values() if row.provider and row.device == "gpu"],
    ids=lambda row: row.name,
)
def test_a_provider_that_is_not_there_is_a_sentence(folder: Path, row: Runtime) -> None:
    assert row.provider is not None
    if available(row.provider):
        pytest.skip(f"says what happens without {row.provider}; this onnxruntime has it")
    with pytest.raises(NirvanaError, match=rf"has no {row.provider}, .* {row.name} is\.\n.* doctor"):
        open_runner(folder, runtime=row.name)


def test_a_provider_that_falls_back_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime goes on with the CPU when CUDA's libraries do not load."""
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    session = SimpleNamespace(get_providers=lambda: both[1:])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    with pytest.raises(NirvanaError, match=r"does not start on this machine: .* fell back to CPUExecution"):
        open_runner(folder, runtime="onnxruntime-cuda")


def test_outputs_that_stay_on_the_device_give_the_same_logits(folder: Path) -> None:
    """The path of the GPU providers, with the CPU as the device."""
    plain, bound = OrtDecoder(folder, threads=1), OrtDecoder(folder, threads=1)
    bound._binds_outputs = True
    prompt = np.array([[5, 9, 30, 7]])
    assert greedy_tokens(bound, prompt, max_new_tokens=8) == greedy_tokens(plain, prompt, max_new_tokens=8)
    np.testing.assert_array_equal(bound.prefill(prompt)[0], plain.prefill(prompt)[0])


def test_profile_shapes_are_those_of_each_layer(tmp_path: Path) -> None:
    inputs = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "past_key_values.0.key": ["batch_size", 1, "past_sequence_length", 64],
        "past_key_values.1.key": ["batch_size", 3, "past_sequence_length", 64],
    }
    options = tensorrt_options("NvTensorRTRTXExecutionProvider", inputs, cache=tmp_path, total_tokens=100)
    assert options == {
        "nv_profile_min_shapes": "input_ids:1x1,attention_mask:1x1,"
        "past_key_values.0.key:1x1x0x64,past_key_values.1.key:1x3x0x64",
        "nv_profile_opt_shapes": "input_ids:1x1,attention_mask:1x51,"
        "past_key_values.0.key:1x1x50x64,past_key_values.1.key:1x3x50x64",
        "nv_profile_max_shapes": "input_ids:1x100,attention_mask:1x100,"
        "past_key_values.0.key:1x1x99x64,past_key_values.1.key:1x3x99x64",
        "nv_runtime_cache_path": str(tmp_path),
    }
    options = tensorrt_options("TensorrtExecutionProvider", inputs, cache=tmp_path, total_tokens=100)
    assert options["trt_profile_min_shapes"].startswith("input_ids:1x1,")
    assert options["trt_engine_cache_enable"] == "1"
    with pytest.raises(NirvanaError, match="x has the dimension 'width'; a range is known for batch_size,"):
        tensorrt_options("TensorrtExecutionProvider", {"x": ["width"]}, cache=tmp_path)


def test_models_of_one_graph_and_other_weights_share_no_engine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIRVANA_DEPLOY_CACHE", str(tmp_path / "cache"))
    other = shutil.copytree(folder, tmp_path / "fine-tuned")
    same = options_for(other, "TensorrtExecutionProvider")
    assert same == options_for(folder, "TensorrtExecutionProvider")
    weights = bytearray((other / "model.onnx.data").read_bytes())
    weights[0] ^= 1
    (other / "model.onnx.data").write_bytes(weights)
    anew = options_for(other, "TensorrtExecutionProvider")
    assert anew["trt_engine_cache_path"] != same["trt_engine_cache_path"]


# the worker


def test_a_worker_serves_an_engine(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[TensorRTRunner] = []

    def open_engine(path: Path, *, runtime: str, threads: int | None) -> TensorRTRunner:
        opened.append(fake_runner(path))
        return opened[-1]

    monkeypatch.setattr("nirvana_deploy.runtime.tensorrt.decoder.open_engine", open_engine)
    requests = io.StringIO(json.dumps({"tokens": [[5, 6, 7]], "new_tokens": 4}) + "\n")
    answers = io.StringIO()
    serve(engine, threads=None, requests=requests, answers=answers)
    loaded, sample = map(json.loads, answers.getvalue().splitlines())
    assert (loaded["runtime"], loaded["vocab_size"]) == ("tensorrt-rtx", 272)
    assert sample["device_ms"] == pytest.approx([PASS_MS] * 4)
    assert sample["peak_device_bytes"] == opened[0].peak_device_bytes() > 0


def test_a_prompt_that_an_engine_does_not_take_is_an_answer(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nirvana_deploy.runtime.tensorrt.decoder.open_engine", lambda path, **_: fake_runner(path)
    )
    requests = io.StringIO(json.dumps({"tokens": [[5] * 39], "new_tokens": 4}) + "\n")
    answers = io.StringIO()
    serve(engine, threads=None, requests=requests, answers=answers)
    answer = json.loads(answers.getvalue().splitlines()[1])
    assert "exceed the 40" in answer["error"]


def test_a_worker_says_that_there_is_no_gpu(engine: Path) -> None:
    if (reason := why_no_gpu()) is None:
        pytest.skip("says what happens without a GPU; this machine has one")
    tensorrt_rtx = needs("tensorrt_rtx")
    record = read_engine_record(engine)
    assert record.runtime_version.split(".")[:2] == tensorrt_rtx.__version__.split(".")[:2]
    with pytest.raises(NirvanaError) as caught, WorkerProcess("pruned", engine, threads=None):
        pass
    assert caught.value.message == f"pruned: {reason}"


def test_device_times_are_split_into_prefill_and_decode() -> None:
    samples = [RoundSample(9.0, 9.5, (1.0, 1.0), device_ms=(3.0, 4.0, 0.5, 0.7)) for _ in range(2)]
    found = device_times(samples)  # a prompt in two passes
    assert found["prefill_device_ms"]["p50"] == pytest.approx(7.0)
    assert found["decode_device_ms"]["samples"] == pytest.approx([0.5, 0.7, 0.5, 0.7])
    untold = device_times([*samples, RoundSample(9.0, 9.5, (1.0, 1.0))])
    assert untold == {"prefill_device_ms": None, "decode_device_ms": None}


# streaming text


def test_text_comes_in_whole_characters(folder: Path) -> None:
    tokenizer, stops = load_text_side(folder)
    assert stops == {2}
    pieces: list[str] = []
    stream = TextPieces(tokenizer, pieces.append, hidden=stops)
    for token in [*tokenizer("aü€b")["input_ids"], 2]:
        stream.add(token)
    assert pieces == ["a", "ü", "€", "b"]
    assert stream.finish() == "aü€b"


def test_an_unfinished_character_is_told_at_the_end(folder: Path) -> None:
    tokenizer, _ = load_text_side(folder)
    pieces: list[str] = []
    stream = TextPieces(tokenizer, pieces.append)
    stream.add(tokenizer("ü")["input_ids"][0])
    assert pieces == []
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_continuation_keeps_the_space_that_it_begins_with() -> None:
    words = ["<unk>", "<s>", "</s>", "▁is", "▁Paris", "<0xE2>", "<0x82>", "<0xAC>", "x"]
    tokenizer = LlamaTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[])
    paris, euro = [4], [5, 6, 7]

    def streamed(ids: list[int], after: list[int]) -> str:
        pieces: list[str] = []
        stream = TextPieces(tokenizer, pieces.append, hidden=frozenset({2}), after=after)
        for token in [*ids, 2]:
            stream.add(token)
        text = stream.finish()
        assert "".join(pieces) == text
        return text

    assert streamed(paris, []) == "Paris"
    assert streamed(paris, [1]) == "Paris"
    for after in ([3], [1, 3], [3] * 30):
        assert streamed(paris, after) == " Paris"
        assert streamed([8, *euro], after) == "x€"
    for cut in (1, 2):  # the prompt ends within a character, which is finished, or never will be
        assert streamed([*euro[cut:], *paris], [3, *euro[:cut]]) == "€ Paris"
        assert streamed([*paris, 8], [3, *euro[:cut]]) == " Parisx"
    assert streamed(euro[:1], [3]) == "\N{REPLACEMENT CHARACTER}"


def test_any_runner_streams_the_same_text(folder: Path, engine: Path) -> None:
    tokenizer, stops = load_text_side(folder)
    texts = []
    for runner in (OrtDecoder(folder, threads=1), fake_runner(engine)):
        pieces: list[str] = []
        answer = stream_text(runner, tokenizer, "Hello", max_new_tokens=9, stops=stops, on_text=pieces.append)
        assert "".join(pieces) == answer.text
        assert (answer.prompt_tokens, answer.new_tokens <= 9) == (5, True)
        texts.append(answer.text)
    assert texts[0] == texts[1]


def test_a_prompt_of_no_tokens_and_a_missing_chat_template_are_sentences(folder: Path) -> None:
    tokenizer, _ = load_text_side(folder)
    runner = OrtDecoder(folder, threads=1)
    with pytest.raises(NirvanaError, match="The prompt has no tokens"):
        stream_text(runner, tokenizer, "", max_new_tokens=2)
    with pytest.raises(NirvanaError, match="--chat needs a tokenizer with a chat template"):
        stream_text(runner, tokenizer, "Hi", max_new_tokens=2, chat=True)


def test_the_model_and_its_tokenizer_are_found(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out / "onnx")
    (out / "engine").mkdir()
    (out / "engine" / "m.engine").write_bytes(b"")
    assert model_in(out) == out / "onnx"
    assert model_in(out / "onnx") == out / "onnx"
    (out / "checkpoint").mkdir()
    (out / "checkpoint" / "config.json").touch()
    for path in (out, out / "checkpoint"):
        assert model_in(path, runtime="torch") == out / "checkpoint"
    assert tokenizer_folder(out / "engine" / "m.engine") == out / "onnx"
    assert tokenizer_folder(out / "onnx") == out / "onnx"
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    (alone / "engine").mkdir()
    (alone / "engine" / "m.engine").touch()
    assert tokenizer_folder(alone / "engine" / "m.engine") == alone
    with pytest.raises(NirvanaError, match=r"holds no model: neither model\.onnx nor onnx/model\.onnx"):
        model_in(tmp_path)
    with pytest.raises(NirvanaError, match="No tokenizer lies in"):
        tokenizer_folder(out / "onnx", given=tmp_path)


def test_generate_writes_text_to_stdout_and_speed_to_stderr(folder: Path) -> None:
    arguments = ["generate", str(folder), "--prompt", "Hello", "--max-new-tokens", "5", "--threads", "1"]
    streamed = CliRunner().invoke(commands, arguments, catch_exceptions=False)
    assert "tokens after 5, TTFT" in streamed.stderr
    assert "(onnxruntime-cpu)" in streamed.stderr
    as_json = json.loads(CliRunner().invoke(commands, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert streamed.stdout == as_json["text"] + "\n"
    assert (as_json["runtime"], as_json["prompt_tokens"]) == ("onnxruntime-cpu", 5)
