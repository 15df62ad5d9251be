"""The two engines of an encoder-decoder, run on fakes against ONNX Runtime on the exported folder."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.arrays import equal, random_tokens
from builders.extras import needs
from builders.fake_cuda import FakeDriver
from builders.fake_tensorrt import (
    PASS_MS,
    SCRATCH_BYTES,
    WEIGHTS_BYTES,
    fake_module,
    pretend_gpu,
    write_fake_engine,
)
from builders.tiny_t5 import write_t5

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.engine.drop_branch import drop_cache_branch
from nirvana_deploy.engine.profile import profiles_for, shapes_of
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.source import read_source
from nirvana_deploy.engine.stage import engines_from_onnx_folder
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.benchmark import device_times
from nirvana_deploy.measure.worker import RoundSample, serve
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.layout import DECODER_FILE, ENCODER_FILE
from nirvana_deploy.runtime.onnxruntime.encoder_decoder import OrtSeq2Seq
from nirvana_deploy.runtime.runner import greedy_tokens, window_logits
from nirvana_deploy.runtime.tensorrt.decoder import TensorRTRunner, open_engine
from nirvana_deploy.runtime.tensorrt.encoder_decoder import TensorRTSeq2Seq
from nirvana_deploy.runtime.tensorrt.memory import plan_seq2seq_memory
from nirvana_deploy.runtime.tensorrt.record import read_engine_record, record_path
from nirvana_deploy.verify.cases import engine_cases, random_prompts
from nirvana_deploy.verify.compare import compare_runners

LENGTHS = Lengths(max_batch=3, max_length=24, opt_prompt=8, opt_length=12)
FILES = {"encoder": ENCODER_FILE, "decoder": DECODER_FILE}


@pytest.fixture(scope="module", params=["t5", "flan-t5"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as it is exported: ONNX Runtime runs it."""
    root = tmp_path_factory.mktemp("seq2seq")
    onnx_from_checkpoint(Checkpoint.open(write_t5(root / "model", request.param)), root / "onnx")
    return root / "onnx"


@pytest.fixture(scope="module")
def decoder(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine of the decoder, the encoder's and the ONNX folder that both were built from beside it."""
    out = tmp_path_factory.mktemp("engines")
    folder = out / "t5-onnx"
    shutil.copytree(exported, folder)
    drop_cache_branch(folder / DECODER_FILE)
    for part, file in FILES.items():
        source = read_source(folder / file)
        profiles = [shapes_of(source, profile) for profile in profiles_for(source, LENGTHS)]
        write_fake_engine(out / f"t5-{part}.engine", folder, profiles=profiles, file=file, part=part)
    return out / "t5-decoder.engine"


@pytest.fixture(scope="module")
def oracle(exported: Path) -> OrtSeq2Seq:
    return OrtSeq2Seq(exported, threads=1)


@pytest.fixture
def runner(decoder: Path, driver: FakeDriver) -> Iterator[TensorRTSeq2Seq]:
    with TensorRTSeq2Seq(decoder, driver=driver, module=fake_module(driver)) as opened:
        yield opened
    assert driver.leaks == {}
    assert driver.used_bytes == 0


def both_sides(sequences: int, tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A mask: the first prompt padded on the left, the second on the right."""
    mask = np.ones((sequences, tokens), dtype=np.int64)
    mask[0, :2], mask[1, -3:] = 0, 0
    return mask


def test_an_answer_to_the_last_slot_equals_onnxruntime(runner: TensorRTSeq2Seq, oracle: OrtSeq2Seq) -> None:
    prompts, mask, answer = random_tokens(3, 9), both_sides(3, 9), random_tokens(3, 24, seed=6)
    found, state = runner.prefill(prompts, mask)
    expected, other = oracle.prefill(prompts, mask)
    assert (found.dtype, found.shape) == (np.float32, (3, 1, oracle.vocab_size))
    equal(found, expected)
    for position in range(23):
        found, state = runner.decode(answer[:, position : position + 1], state)
        expected, other = oracle.decode(answer[:, position : position + 1], other)
        equal(found, expected)
    with pytest.raises(NirvanaError, match=r"^25 tokens of an answer, .* exceed the 24 that t5-decoder"):
        runner.decode(answer[:, :1], state)


def test_greedy_answers_equal_onnxruntime_prompt_after_prompt(
    runner: TensorRTSeq2Seq, oracle: OrtSeq2Seq
) -> None:
    for tokens in (24, 1, 7):
        prompt, heard = random_tokens(1, tokens, seed=tokens), list[int]()
        found = greedy_tokens(runner, prompt, max_new_tokens=12, on_token=heard.append)
        assert found == heard == greedy_tokens(oracle, prompt, max_new_tokens=12)
    stop = found[5]
    stopped = greedy_tokens(runner, prompt, max_new_tokens=12, eos_token_ids=frozenset({stop}))
    assert stopped == found[: found.index(stop) + 1]


def test_text_is_judged_with_the_answer_given(runner: TensorRTSeq2Seq, oracle: OrtSeq2Seq) -> None:
    """Several decoder tokens at once are as many passes here."""
    windows = random_tokens(2, 20)
    found = window_logits(runner, windows)
    assert found.shape[:2] == (2, 11)  # ten predicted tokens, and what follows the last one
    equal(found, window_logits(oracle, windows))


def test_the_corners_of_both_engines_are_compared(
    runner: TensorRTSeq2Seq, oracle: OrtSeq2Seq, decoder: Path
) -> None:
    cases = list(engine_cases(read_engine_record(decoder), vocab_size=runner.vocab_size))
    names = [case.name for case in cases]
    assert {"prefill 1 x 1", "prefill 1 x 8", "prefill 3 x 24"} <= set(names)
    assert any("left-padded" in name for name in names)
    assert "prefill 1 x 22, then 2 decode steps" in names
    prompts = random_prompts(runner.vocab_size)

    def report() -> Any:
        return compare_runners(oracle, runner, cases=cases, tolerance=1e-4, prompts=prompts, new_tokens=8)

    assert report().passed
    runner.start_token += 1
    assert not report().passed


def test_onnxruntime_runs_the_file_that_an_engine_is_built_from(decoder: Path, oracle: OrtSeq2Seq) -> None:
    given, prompt = OrtSeq2Seq(decoder.parent / "t5-onnx", threads=1), random_tokens(1, 7)
    assert greedy_tokens(given, prompt, max_new_tokens=12) == greedy_tokens(oracle, prompt, max_new_tokens=12)


def test_gpu_time_is_that_of_every_pass(runner: TensorRTSeq2Seq) -> None:
    greedy_tokens(runner, random_tokens(1, 5), max_new_tokens=4)
    assert runner.device_ms() == pytest.approx([PASS_MS] * 5)  # the encoder's, and four of the decoder
    assert runner.device_ms() == ()


def test_buffers_have_the_sizes_of_the_largest_profile(
    runner: TensorRTSeq2Seq, decoder: Path, driver: FakeDriver
) -> None:
    """2 layers, 5 heads of 8, D = 48, 3 sequences of 24 tokens on either side, all in float32."""
    plan = plan_seq2seq_memory(read_engine_record(decoder))
    assert plan.kv_cache_bytes == 2 * (2 * 2 * 2) * (3 * 5 * 24 * 8 * 4)  # copies; layers, k and v, caches
    states_bytes, from_host = 3 * 24 * 48 * 4, 2 * 8 * 3 * 24
    scratch_bytes = max(SCRATCH_BYTES[:2]) + SCRATCH_BYTES[0]
    assert (
        driver.used_bytes == plan.device_bytes + states_bytes + from_host + scratch_bytes + 2 * WEIGHTS_BYTES
    )
    assert runner.peak_device_bytes() == driver.used_bytes
    before = driver.calls.count("cuMemAlloc")
    runner.prefill(random_tokens(3, 24))
    assert driver.calls.count("cuMemAlloc") == before


def test_a_state_that_was_continued_is_refused(runner: TensorRTSeq2Seq) -> None:
    state = runner.encode(random_tokens(1, 4))
    runner.decode(random_tokens(1, 1), state)
    with pytest.raises(NirvanaError, match="no longer in the engine's cache"):
        runner.decode(random_tokens(1, 1), state)
    state = runner.encode(random_tokens(1, 4))
    runner.encode(random_tokens(1, 4, seed=8))
    with pytest.raises(NirvanaError, match="no longer in the engine's cache"):
        runner.decode(random_tokens(1, 1), state)


def test_a_prompt_beyond_the_profiles_is_refused(runner: TensorRTSeq2Seq) -> None:
    with pytest.raises(
        NirvanaError, match=r"'encoder' takes input_ids of \[1, 1\] to \[3, 24\], not \[1, 25\]"
    ):
        runner.prefill(random_tokens(1, 25))
    with pytest.raises(NirvanaError, match="at least one token"):
        runner.prefill(np.zeros((1, 0), dtype=np.int64))


@pytest.mark.integration
def test_an_onnx_folder_is_built_from_a_copy_without_the_branch(tmp_path: Path) -> None:
    """With the real builder: it refuses the decoder as it is exported."""
    needs("tensorrt_rtx")
    folder = tmp_path / "onnx"
    onnx_from_checkpoint(Checkpoint.open(write_t5(tmp_path / "model", "t5")), folder, dtype="fp16")
    before = (folder / DECODER_FILE).read_bytes()
    paths = engines_from_onnx_folder(folder, folder / "engine", name="t5", lengths=LENGTHS)
    assert [path.name for path in paths] == ["t5-encoder.engine", "t5-decoder.engine"]
    assert (folder / DECODER_FILE).read_bytes() == before
    read = {one.name for one in read_engine_record(paths[1]).inputs}
    assert "encoder_hidden_states" in read and "use_cache_branch" not in read
    given, exported = (OrtSeq2Seq(one, threads=1) for one in (folder / "engine" / "t5-onnx", folder))
    prompt = random_tokens(1, 6)
    assert greedy_tokens(given, prompt, max_new_tokens=6) == greedy_tokens(exported, prompt, max_new_tokens=6)


def test_a_worker_measures_both_engines(
    decoder: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_fake(path: Path, **_: Any) -> TensorRTSeq2Seq:
        return TensorRTSeq2Seq(path, driver=driver, module=fake_module(driver))

    monkeypatch.setattr("nirvana_deploy.runtime.tensorrt.decoder.open_engine", open_fake)
    requests = io.StringIO(json.dumps({"tokens": [[5, 6, 7]], "new_tokens": 4}) + "\n")
    answers = io.StringIO()
    serve(decoder, threads=None, requests=requests, answers=answers)
    loaded, sample = map(json.loads, answers.getvalue().splitlines())
    assert loaded["runtime"] == "tensorrt-rtx"
    assert sample["peak_device_bytes"] > 2 * WEIGHTS_BYTES
    times = device_times([RoundSample(9.0, 9.5, tuple(sample["itl_ms"]), tuple(sample["device_ms"]))])
    assert times["prefill_device_ms"]["p50"] == pytest.approx(2 * PASS_MS)  # encoder and first token
    assert times["decode_device_ms"]["samples"] == pytest.approx([PASS_MS] * 3)


# engines that are refused


@pytest.fixture
def copied(decoder: Path, tmp_path: Path) -> Path:
    """Both engines in a folder of their own; the ONNX folder that they name stays where it is."""
    for file in decoder.parent.glob("t5-*coder.*"):
        shutil.copy(file, tmp_path)
    shutil.copy(decoder.parent / "t5-onnx" / "config.json", tmp_path)
    return tmp_path / decoder.name


def refused(engine: Path, **module: Any) -> NirvanaError:
    driver = FakeDriver()
    with pytest.raises(NirvanaError) as caught:
        TensorRTSeq2Seq(engine, driver=driver, module=fake_module(driver, **module))
    assert driver.leaks == {}
    return caught.value


def change_record(engine: Path, **changes: Any) -> None:
    write_json(record_path(engine), {**read_json(record_path(engine)), **changes})


def test_both_engines_are_opened_by_the_decoder(decoder: Path, copied: Path) -> None:
    error = refused(decoder.with_name("t5-encoder.engine"))
    assert "is the encoder of an encoder-decoder" in error.message
    assert error.hint == "Pass t5-decoder.engine beside it."
    copied.with_name("t5-encoder.engine").unlink()
    assert "t5-encoder.engine does not exist." in refused(copied).message


def test_a_decoder_of_this_kind_is_no_decoder_alone(decoder: Path) -> None:
    driver = FakeDriver()
    with pytest.raises(NirvanaError, match="running needs a decoder"):
        TensorRTRunner(decoder, driver=driver, module=fake_module(driver))


def test_engines_of_two_builds_are_refused(copied: Path) -> None:
    record = read_json(record_path(copied))
    for profile in record["profiles"]:
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            profile["shapes"][name][2][1] = 16
    change_record(copied, profiles=record["profiles"])
    assert "are not the two engines of one build" in refused(copied).message


def test_either_engine_may_be_of_another_version_or_gpu(copied: Path) -> None:
    assert "1.6.0.31 is installed" in refused(copied, version="1.6.0.31").message
    change_record(copied.with_name("t5-encoder.engine"), targets=["sm120"])
    assert "t5-encoder.engine was built for sm120" in refused(copied).message


def test_without_a_config_nothing_says_what_is_read_first(copied: Path) -> None:
    (copied.parent / "config.json").unlink()
    error = refused(copied)
    assert "No config.json near" in error.message and "beside t5-decoder.engine" in str(error.hint)


def test_a_device_too_small_frees_what_it_gave(copied: Path) -> None:
    driver = FakeDriver(memory_bytes=2 * WEIGHTS_BYTES + 9000)
    with pytest.raises(NirvanaError, match="has no room for the"):
        TensorRTSeq2Seq(copied, driver=driver, module=fake_module(driver))
    assert driver.leaks == {} and driver.used_bytes == 0


def test_opening_finds_the_kind(decoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_gpu(monkeypatch, tmp_path)
    with open_engine(decoder, runtime="tensorrt-rtx") as opened:
        assert isinstance(opened, TensorRTSeq2Seq)
        greedy_tokens(opened, random_tokens(1, 4), max_new_tokens=2)
    assert len(list((tmp_path / "kernels").iterdir())) == 2
