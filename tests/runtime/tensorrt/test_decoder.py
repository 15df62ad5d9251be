"""The runner's host logic, end to end: a fake engine computes with ONNX Runtime on fake device memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.arrays import equal, random_tokens
from builders.fake_cuda import FakeDriver
from builders.fake_tensorrt import (
    PASS_MS,
    SCRATCH_BYTES,
    WEIGHTS_BYTES,
    FakeContext,
    decoder_profiles,
    fake_module,
    write_fake_engine,
)

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError, pip_install
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.runner import greedy_tokens
from nirvana_deploy.runtime.tensorrt.decoder import TensorRTRunner
from nirvana_deploy.runtime.tensorrt.memory import plan_memory
from nirvana_deploy.runtime.tensorrt.record import read_engine_record, record_path
from nirvana_deploy.runtime.tensorrt.session import as_float32

BATCH, STEP_TOKENS, TOTAL_TOKENS = 3, 16, 40
FORMS = ("concat", "in-place")


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same small model with a cache of either form."""
    root = tmp_path_factory.mktemp("engine-forms")
    onnx_from_checkpoint(Checkpoint.open(tiny_llama), root / "concat")
    onnx_from_checkpoint(
        Checkpoint.open(tiny_llama), root / "in-place", flavor="static-cache", cache_tokens=TOTAL_TOKENS
    )
    return {form: root / form for form in FORMS}


@pytest.fixture(scope="module")
def oracle(folders: dict[str, Path]) -> OrtDecoder:
    return OrtDecoder(folders["concat"], threads=1)


@pytest.fixture
def folder(folders: dict[str, Path], form: str) -> Path:
    return folders[form]


@pytest.fixture
def engine(folder: Path, tmp_path: Path) -> Path:
    profiles = decoder_profiles(folder, batch_size=BATCH, step_tokens=STEP_TOKENS, total_tokens=TOTAL_TOKENS)
    return write_fake_engine(tmp_path / "model.engine", folder, profiles=profiles)


@pytest.fixture
def runner(engine: Path, driver: FakeDriver) -> Iterator[TensorRTRunner]:
    with TensorRTRunner(engine, driver=driver, module=fake_module(driver)) as opened:
        yield opened
    assert driver.leaks == {}
    assert driver.used_bytes == 0


def test_dimensions_come_from_the_record(runner: TensorRTRunner, oracle: OrtDecoder) -> None:
    for name in ("kv_heads", "head_dim", "vocab_size"):
        assert getattr(runner, name) == getattr(oracle, name)
    assert (runner.runtime, runner.threads) == ("tensorrt-rtx", 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 16)], ids=str)
def test_prefill_logits_equal_onnxruntime(
    runner: TensorRTRunner, oracle: OrtDecoder, shape: tuple[int, int]
) -> None:
    tokens = random_tokens(*shape)
    found, _ = runner.prefill(tokens)
    assert (found.dtype, found.shape) == (np.float32, (*shape, oracle.vocab_size))
    equal(found, oracle.prefill(tokens)[0])


def test_decoding_to_the_last_slot_equals_onnxruntime(runner: TensorRTRunner, oracle: OrtDecoder) -> None:
    tokens = random_tokens(2, TOTAL_TOKENS)
    expected, _ = oracle.prefill(tokens)
    found, state = runner.prefill(tokens[:, :9])
    equal(found, expected[:, :9])
    for position in range(9, TOTAL_TOKENS):
        found, state = runner.decode(tokens[:, position : position + 1], state)
        equal(found[:, 0], expected[:, position])
    with pytest.raises(NirvanaError, match=r"^41 tokens, .* exceed the 40 that model\.engine has room for"):
        runner.decode(tokens[:, :1], state)


def test_a_prompt_longer_than_a_pass_is_read_in_several(
    runner: TensorRTRunner, oracle: OrtDecoder, driver: FakeDriver
) -> None:
    tokens = random_tokens(1, 37)
    found, state = runner.prefill(tokens)
    equal(found, oracle.prefill(tokens)[0])
    assert len(runner.device_ms()) == 3  # 16 + 16 + 5
    follow = random_tokens(1, 1, seed=8)
    equal(runner.decode(follow, state)[0], oracle.prefill(np.concatenate([tokens, follow], 1))[0][:, -1:])


@pytest.mark.parametrize("prompt_tokens", [11, 20], ids=["one pass", "two passes"])
def test_left_padded_rows_equal_each_prompt_alone(
    runner: TensorRTRunner, oracle: OrtDecoder, prompt_tokens: int
) -> None:
    tokens, lengths = random_tokens(3, prompt_tokens), (prompt_tokens, 4, prompt_tokens - 2)
    mask = (np.arange(prompt_tokens) >= prompt_tokens - np.array(lengths)[:, None]).astype(np.int64)
    steps = random_tokens(3, 5, seed=6)
    found, state = runner.prefill(tokens, mask)
    after = []
    for step in range(5):
        logits, state = runner.decode(steps[:, step : step + 1], state)
        after.append(logits)
    for row, length in enumerate(lengths):
        alone = np.concatenate([tokens[row, prompt_tokens - length :], steps[row]])[None]
        expected, _ = oracle.prefill(alone)
        equal(found[row, prompt_tokens - length :], expected[0, :length])
        equal(np.concatenate(after, axis=1)[row], expected[0, length:])


def test_greedy_tokens_equal_onnxruntime(runner: TensorRTRunner, oracle: OrtDecoder) -> None:
    prompt, heard = random_tokens(1, 6), list[int]()
    found = greedy_tokens(runner, prompt, max_new_tokens=20, on_token=heard.append)
    assert found == heard == greedy_tokens(oracle, prompt, max_new_tokens=20)
    stop = found[7]
    stopped = greedy_tokens(runner, prompt, max_new_tokens=20, eos_token_ids=frozenset({stop}))
    assert stopped == found[: found.index(stop) + 1]


def test_a_second_prompt_sees_nothing_of_the_first(runner: TensorRTRunner, oracle: OrtDecoder) -> None:
    greedy_tokens(runner, random_tokens(1, 15), max_new_tokens=20)
    short = random_tokens(1, 3, seed=9)
    assert greedy_tokens(runner, short, max_new_tokens=8) == greedy_tokens(oracle, short, max_new_tokens=8)
    equal(runner.prefill(random_tokens(2, 5))[0], oracle.prefill(random_tokens(2, 5))[0])


def test_returned_logits_are_the_callers_own(runner: TensorRTRunner) -> None:
    logits, state = runner.prefill(random_tokens(1, 4))
    first, state = runner.decode(random_tokens(1, 1), state)
    kept = logits.copy(), first.copy()
    runner.decode(random_tokens(1, 1, seed=7), state)
    np.testing.assert_array_equal(logits, kept[0])
    np.testing.assert_array_equal(first, kept[1])


def test_a_state_that_was_continued_is_refused(runner: TensorRTRunner) -> None:
    _, state = runner.prefill(random_tokens(1, 4))
    runner.decode(random_tokens(1, 1), state)
    with pytest.raises(NirvanaError, match="no longer in the engine's cache"):
        runner.decode(random_tokens(1, 1), state)


@pytest.mark.parametrize("shape", [(0, 3), (1, 0), (3,)])
def test_an_empty_prompt_is_refused(runner: TensorRTRunner, shape: tuple[int, ...]) -> None:
    with pytest.raises(NirvanaError, match="at least one token"):
        runner.prefill(np.zeros(shape, dtype=np.int64))


def test_a_batch_beyond_the_profiles_is_refused(runner: TensorRTRunner) -> None:
    with pytest.raises(
        NirvanaError, match=r"'prefill' takes input_ids of \[1, 1\] to \[3, 16\], not \[4, 5\]"
    ):
        runner.prefill(random_tokens(4, 5))


# buffers


def test_buffers_have_the_sizes_of_the_largest_profile(
    runner: TensorRTRunner, engine: Path, driver: FakeDriver, form: str
) -> None:
    heads, dim, vocabulary = sum(runner.kv_heads), runner.head_dim, runner.vocab_size
    cache_bytes = 2 * 4 * BATCH * heads * TOTAL_TOKENS * dim * (2 if form == "concat" else 1)
    logits_bytes = 4 * BATCH * STEP_TOKENS * vocabulary
    ids_bytes = 8 * BATCH * STEP_TOKENS
    of_form = {"concat": 8 * BATCH * TOTAL_TOKENS + ids_bytes, "in-place": 8 * BATCH}[form]
    plan = plan_memory(read_engine_record(engine))
    assert plan.kv_cache_bytes == cache_bytes
    assert plan.device_bytes == cache_bytes + logits_bytes + ids_bytes + of_form
    assert driver.used_bytes == plan.device_bytes + max(SCRATCH_BYTES[:2]) + WEIGHTS_BYTES
    assert runner.peak_device_bytes() == driver.used_bytes


def test_nothing_is_allocated_after_the_start(runner: TensorRTRunner, driver: FakeDriver) -> None:
    before, count = driver.used_bytes, driver.calls.count("cuMemAlloc")
    greedy_tokens(runner, random_tokens(1, 12), max_new_tokens=20)
    runner.prefill(random_tokens(3, 16))
    assert (driver.used_bytes, driver.calls.count("cuMemAlloc")) == (before, count)


@dataclass(frozen=True)
class Pass:
    """What a context was bound to."""

    profile: int
    past: int
    present: int
    shapes: dict[str, Any]


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """The bindings of every pass that is queued one by one."""
    found: list[Pass] = []
    original = FakeContext.execute_async_v3

    def spy(self: FakeContext, stream_handle: int) -> bool:
        past, present = (self.addresses[name] for name in ("past_key_values.0.key", "present.0.key"))
        assert self.profile is not None
        found.append(Pass(self.profile, past, present, dict(self.shapes)))
        return original(self, stream_handle)

    monkeypatch.setattr(FakeContext, "execute_async_v3", spy)
    return found


def test_past_and_present_take_turns_or_are_one(runner: TensorRTRunner, bound: list[Pass], form: str) -> None:
    greedy_tokens(runner, random_tokens(1, 5), max_new_tokens=4)
    found = list(bound)
    if form == "concat":
        a, b = found[0].past, found[0].present
        assert a != b
        assert [(p.past, p.present) for p in found] == [(a, b), (b, a), (a, b), (b, a)]
        assert [p.shapes["past_key_values.0.key"][2] for p in found] == [0, 5, 6, 7]
    else:
        assert {(p.past, p.present) for p in found} == {(found[0].past, found[0].past)}
        assert {p.shapes["past_key_values.0.key"][2] for p in found} == {TOTAL_TOKENS}
    assert [p.profile for p in found] == [0] + [1] * (len(found) - 1)


# graphs


def graph_calls(driver: FakeDriver) -> list[str]:
    named = {
        "cuStreamBeginCapture": "begin",
        "cuStreamEndCapture": "end",
        "cuGraphInstantiate": "instantiate",
        "cuGraphLaunch": "launch",
        "cuStreamSynchronize": "wait",
    }
    return [named[call] for call in driver.calls if call in named]


def test_decode_is_captured_after_its_first_run_and_repeated(
    engine: Path, driver: FakeDriver, form: str, oracle: OrtDecoder
) -> None:
    module = fake_module(driver)
    with TensorRTRunner(engine, driver=driver, module=module) as runner:
        driver.calls.clear()
        prompt = random_tokens(1, 5)
        assert greedy_tokens(runner, prompt, max_new_tokens=5) == greedy_tokens(
            oracle, prompt, max_new_tokens=5
        )
        if form == "concat":
            assert graph_calls(driver) == ["wait"] * 5
            return
        capture = ["begin", "end", "instantiate"]
        launch = ["launch", "wait"]
        assert graph_calls(driver) == ["wait", "wait", *capture, *launch, *launch, *launch]
        greedy_tokens(runner, prompt, max_new_tokens=4)  # a new prompt repeats the same graph
        assert graph_calls(driver)[-8:] == [*launch, "wait", *launch, *launch, *launch][-8:]
        assert runner.graph_refused is None
    assert module.passes == [["run", "run"], ["run", "captured"]]


def test_each_batch_size_has_a_graph_of_its_own(
    folders: dict[str, Path], tmp_path: Path, driver: FakeDriver, oracle: OrtDecoder
) -> None:
    folder = folders["in-place"]
    profiles = decoder_profiles(folder, batch_size=3, step_tokens=8, total_tokens=TOTAL_TOKENS)
    engine = write_fake_engine(tmp_path / "model.engine", folder, profiles=profiles)
    with TensorRTRunner(engine, driver=driver, module=fake_module(driver)) as runner:
        for batch in (1, 3, 1, 3, 2):
            tokens = random_tokens(batch, 10, seed=batch)
            expected, _ = oracle.prefill(tokens)
            _, state = runner.prefill(tokens[:, :4])
            for position in range(4, 10):
                found, state = runner.decode(tokens[:, position : position + 1], state)
                equal(found[:, 0], expected[:, position])
    assert driver.calls.count("cuStreamBeginCapture") == 3


def test_an_engine_that_cannot_be_captured_runs_without_a_graph(
    folders: dict[str, Path], tmp_path: Path, driver: FakeDriver, oracle: OrtDecoder
) -> None:
    folder = folders["in-place"]
    profiles = decoder_profiles(folder, batch_size=1, step_tokens=8, total_tokens=TOTAL_TOKENS)
    engine = write_fake_engine(tmp_path / "m.engine", folder, profiles=profiles, capturable=False)
    with TensorRTRunner(engine, driver=driver, module=fake_module(driver)) as runner:
        prompt = random_tokens(1, 5)
        assert greedy_tokens(runner, prompt, max_new_tokens=6) == greedy_tokens(
            oracle, prompt, max_new_tokens=6
        )
        assert runner.graph_refused is not None
        assert "cannot capture this engine" in runner.graph_refused
    assert "cuGraphLaunch" not in driver.calls


def test_one_profile_serves_both_passes(
    folders: dict[str, Path], tmp_path: Path, driver: FakeDriver, form: str, oracle: OrtDecoder
) -> None:
    """The context that a graph was captured from is not the one whose shapes prefill changes."""
    profiles = decoder_profiles(folders[form], batch_size=1, step_tokens=8, total_tokens=TOTAL_TOKENS)[:1]
    engine = write_fake_engine(tmp_path / "m.engine", folders[form], profiles=profiles)
    with TensorRTRunner(engine, driver=driver, module=fake_module(driver)) as runner:
        for seed in (1, 2):
            prompt = random_tokens(1, 7, seed=seed)
            assert greedy_tokens(runner, prompt, max_new_tokens=6) == greedy_tokens(
                oracle, prompt, max_new_tokens=6
            )


def test_plain_tensorrt_needs_no_runtime_config(
    folder: Path, tmp_path: Path, driver: FakeDriver, oracle: OrtDecoder
) -> None:
    profiles = decoder_profiles(folder, batch_size=1, step_tokens=8, total_tokens=TOTAL_TOKENS)
    engine = write_fake_engine(
        tmp_path / "m.engine", folder, profiles=profiles, runtime="tensorrt", version="10.13.3.9"
    )
    module = fake_module(driver, runtime="tensorrt", version="10.13.3.9")
    with TensorRTRunner(engine, driver=driver, module=module) as runner:
        assert runner.runtime == "tensorrt"
        prompt = random_tokens(1, 5)
        assert greedy_tokens(runner, prompt, max_new_tokens=6) == greedy_tokens(
            oracle, prompt, max_new_tokens=6
        )


def test_kernels_are_compiled_once_ever(engine: Path, driver: FakeDriver, tmp_path: Path) -> None:
    compilations = []
    for kept in (tmp_path / "kernels", tmp_path / "kernels", None):
        module = fake_module(driver)
        with TensorRTRunner(engine, driver=driver, module=module, kernel_cache=kept) as runner:
            greedy_tokens(runner, random_tokens(1, 5), max_new_tokens=4)
        compilations.append(module.compilations)
    assert compilations == [2, 0, 2]
    (file,) = (tmp_path / "kernels").iterdir()
    assert file.name.endswith("-sm89.bin")


def test_a_cache_that_cannot_be_written_is_done_without(
    engine: Path, driver: FakeDriver, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    module, kept = fake_module(driver), tmp_path / "file" / "kernels"
    with TensorRTRunner(engine, driver=driver, module=module, kernel_cache=kept) as runner:
        greedy_tokens(runner, random_tokens(1, 5), max_new_tokens=2)


def test_a_cache_whose_folder_is_read_only_is_done_without(
    engine: Path, driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("nirvana_deploy.base.artifact.temporary_beside", read_only)
    module, kept = fake_module(driver), tmp_path / "kernels"
    with TensorRTRunner(engine, driver=driver, module=module, kernel_cache=kept) as runner:
        greedy_tokens(runner, random_tokens(1, 5), max_new_tokens=2)
    assert list(kept.iterdir()) == []


def test_gpu_time_is_that_of_the_passes_alone(runner: TensorRTRunner) -> None:
    greedy_tokens(runner, random_tokens(1, 5), max_new_tokens=4)
    assert runner.device_ms() == pytest.approx([PASS_MS] * 4)
    assert runner.device_ms() == ()


def test_bfloat16_logits_are_widened() -> None:
    values = np.array([1.0, -2.5, 0.0, 3e38], dtype=np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    np.testing.assert_allclose(as_float32(raw, "bfloat16"), values, rtol=1e-2)
    half = np.array([0.5, -1.5], dtype=np.float16)
    np.testing.assert_array_equal(as_float32(half.view(np.uint8), "float16"), [0.5, -1.5])


# engines that are refused


@pytest.fixture
def tiny_engine(folders: dict[str, Path], tmp_path: Path) -> Path:
    profiles = decoder_profiles(folders["concat"], batch_size=1, step_tokens=8, total_tokens=16)
    return write_fake_engine(tmp_path / "model.engine", folders["concat"], profiles=profiles)


def change_record(engine: Path, **changes: Any) -> None:
    write_json(record_path(engine), {**read_json(record_path(engine)), **changes})


def refused(engine: Path, *, driver: FakeDriver | None = None, **module: Any) -> NirvanaError:
    used = driver or FakeDriver()
    with pytest.raises(NirvanaError) as caught:
        TensorRTRunner(engine, driver=used, module=fake_module(used, **module))
    assert used.leaks == {}
    return caught.value


def test_an_engine_of_another_version(tiny_engine: Path) -> None:
    error = refused(tiny_engine, version="1.6.0.31")
    assert error.message == (
        "model.engine was built by tensorrt-rtx 1.7.1.116; 1.6.0.31 is installed, and an engine is read by "
        "1.7 alone."
    )
    assert error.hint == f"Build it again, or: {pip_install()} 'tensorrt-rtx-cu12==1.7.1.116'"


def test_a_wrong_compute_capability(tiny_engine: Path) -> None:
    error = refused(tiny_engine, driver=FakeDriver(capability=(12, 0)))
    assert error.message == "model.engine was built for sm86, sm89; this machine's Fake L4 is sm120."
    assert "--engine tensorrt-rtx --target sm120" in str(error.hint)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda b: b[:-10], "is truncated: "), (lambda b: b.replace(b"fake", b"FAKE"), "its sha256 differs")],
    ids=["truncated", "other bytes"],
)
def test_a_file_that_is_not_the_one_of_its_record(
    tiny_engine: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    tiny_engine.write_bytes(change(tiny_engine.read_bytes()))
    assert message in refused(tiny_engine).message


def test_a_file_that_tensorrt_does_not_read_says_why(tiny_engine: Path) -> None:
    from nirvana_deploy.base.artifact import sha256_of

    tiny_engine.write_bytes(b"x" * 300)
    change_record(tiny_engine, engine_bytes=300, engine_sha256=sha256_of(tiny_engine))
    error = refused(tiny_engine)
    assert "does not read" in error.message
    assert "header.magicTag == kEXPECTED_MAGIC_TAG failed" in error.message


def test_a_stripped_engine(tiny_engine: Path) -> None:
    change_record(tiny_engine, stripped=True)
    assert "holds no weights" in refused(tiny_engine).message


def test_streamed_weights_get_their_budget_before_any_context(tiny_engine: Path) -> None:
    budgets = []
    for streams in (False, True):
        change_record(tiny_engine, weight_streaming=streams)
        driver = FakeDriver()
        with TensorRTRunner(tiny_engine, driver=driver, module=fake_module(driver)) as runner:
            assert runner._session is not None and runner._session._loaded is not None
            assert not runner._session._contexts
            budgets.append(runner._session._loaded.engine.weight_streaming_budget_v2)
    assert budgets == [WEIGHTS_BYTES, WEIGHTS_BYTES // 2]


def test_an_engine_without_a_cache(tiny_engine: Path) -> None:
    change_record(tiny_engine, kv="none", part="encoder")
    assert "running needs a decoder" in refused(tiny_engine).message


def test_an_engine_that_is_not_what_its_record_says(tiny_engine: Path) -> None:
    profiles = read_json(record_path(tiny_engine))["profiles"]
    profiles[0]["shapes"]["input_ids"][2] = [1, 9]
    change_record(tiny_engine, profiles=profiles)
    assert "is not what its record says: profile 'prefill' of input_ids" in refused(tiny_engine).message


def test_a_device_too_small_names_the_buffer_and_what_to_lower(tiny_engine: Path) -> None:
    error = refused(tiny_engine, driver=FakeDriver(memory_bytes=WEIGHTS_BYTES + SCRATCH_BYTES[0] + 1000))
    assert "has no room for the KV cache (past of 0." in error.message
    assert "--max-batch 1 --max-length 1024" in str(error.hint)
