"""Two runners agree: logits in every case, greedy tokens but at ties."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders.fake_cuda import FakeDriver
from builders.fake_tensorrt import decoder_profiles, fake_module, write_fake_engine
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.onnxruntime.providers import open_on_cpu
from nirvana_deploy.runtime.runner import Runner, greedy_tokens
from nirvana_deploy.runtime.tensorrt.decoder import TensorRTRunner
from nirvana_deploy.runtime.tensorrt.record import read_engine_record
from nirvana_deploy.runtime.torch import open_checkpoint
from nirvana_deploy.verify.cases import engine_cases, random_prompts, runtime_cases
from nirvana_deploy.verify.compare import Continuations, compare_runners, generator, parted_at_a_tie
from nirvana_deploy.verify.tolerance import device_tolerance

PROMPT = np.array([[5, 6, 7]])


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


@pytest.fixture(
    scope="module", params=["torch decoder", "torch encoder-decoder", "decoder", "encoder-decoder"]
)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Each kind of model, as it is trusted: in torch and in ONNX Runtime."""
    folder = tmp_path_factory.mktemp("trusted")
    write = write_t5 if "encoder" in request.param else write_tiny
    checkpoint = write(folder / "model", "flan-t5" if "encoder" in request.param else "llama-tied")
    if "torch" in request.param:
        return open_checkpoint(checkpoint)
    onnx_from_checkpoint(Checkpoint.open(checkpoint), folder / "onnx")
    return open_on_cpu(folder / "onnx", threads=1)


def parted(reference: Runner, at: int) -> tuple[list[int], list[int], float]:
    """Greedy ids, the same with the second-best token at one place, and how far apart both are there.

    The distance is a share of the largest logit.
    """
    wanted = greedy_tokens(reference, PROMPT, max_new_tokens=5)
    logits, state = reference.prefill(PROMPT)
    for token in wanted[:at]:
        logits, state = reference.decode(np.array([[token]]), state)
    last = logits[0, -1]
    second, best = np.argsort(last)[-2:]
    assert best == wanted[at]
    return wanted, [*wanted[:at], int(second), 3], float((last[best] - last[second]) / np.abs(last).max())


@pytest.mark.parametrize("at", [0, 3])
def test_parting_at_a_tie_is_parting_within_the_tolerance(reference: Runner, at: int) -> None:
    """Half as much again is too much: neither a looser rule nor one that accepts nothing passes."""
    wanted, found, apart = parted(reference, at)
    assert apart > 1e-5
    assert parted_at_a_tie(reference, PROMPT, wanted, found, 1.5 * apart)
    assert not parted_at_a_tie(reference, PROMPT, wanted, found, apart / 1.5)


def test_ties_are_counted_beside_equal_prompts(reference: Runner) -> None:
    wanted, found, apart = parted(reference, 2)
    trusted = Continuations(reference, [PROMPT, PROMPT], [wanted, wanted], new_tokens=5)
    for tolerance, ties in ((1.5 * apart, 1), (apart / 1.5, 0)):
        check = trusted.compare("other", [found, wanted], tolerance)
        assert (check.equal_prompts, check.ties, check.passed) == (1, ties, ties == 1)


def test_an_answer_that_is_only_shorter_is_no_tie(reference: Runner) -> None:
    wanted = greedy_tokens(reference, PROMPT, max_new_tokens=4)
    assert not parted_at_a_tie(reference, PROMPT, wanted, wanted[:2], 1e9)


def test_a_stop_token_is_left_out(reference: Runner) -> None:
    whole = generator(reference, 5, frozenset())(PROMPT)
    stop = whole[2]
    assert generator(reference, 5, frozenset({stop}))(PROMPT) == whole[: whole.index(stop)]


GUESSES = {
    "right": lambda whole: whole,
    "nothing": lambda whole: [],
    "shorter": lambda whole: whole[:3],
    "longer": lambda whole: [*whole, 1],
    "wrong at first": lambda whole: [whole[0] ^ 1, *whole[1:]],
    "wrong at last": lambda whole: [*whole[:-1], whole[-1] ^ 1],
}


@pytest.mark.parametrize("guess", GUESSES.values(), ids=GUESSES)
@pytest.mark.parametrize("stopped", [False, True])
def test_a_guess_changes_no_continuation(
    reference: Runner, guess: Callable[[list[int]], list[int]], stopped: bool
) -> None:
    whole = generator(reference, 5, frozenset())(PROMPT)
    stops = frozenset({whole[-1]}) if stopped else frozenset[int]()
    wanted = generator(reference, 5, stops)(PROMPT)
    for guessed in (guess(whole), guess(wanted or whole)):
        found = Continuations.by(reference, [PROMPT], new_tokens=5, stops=stops, guesses=[guessed])
        assert found.ids == [wanted]


def test_a_good_guess_takes_no_step(reference: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generator(reference, 5, frozenset())(PROMPT)
    monkeypatch.setattr("nirvana_deploy.verify.compare.greedy_tokens", lambda *_, **__: pytest.fail("a step"))
    found = Continuations.by(reference, [PROMPT], new_tokens=5, stops=frozenset(), guesses=[whole])
    assert found.ids == [whole]


def test_the_cases_are_the_corners_of_the_profiles(engine: Path) -> None:
    cases = list(engine_cases(read_engine_record(engine), vocab_size=272))
    assert {case.tokens.shape for case in cases} >= {(1, 1), (2, 12), (1, 12)}
    assert any(case.answer.size and not case.mask.all() and len(case.tokens) == 2 for case in cases)


def test_an_engine_that_computes_the_same_passes(folder: Path, engine: Path) -> None:
    reference = OrtDecoder(folder, threads=1)
    cases = list(engine_cases(read_engine_record(engine), vocab_size=272))
    with fake_runner(engine) as runner:
        report = compare_runners(
            reference, runner, cases=cases, tolerance=1e-4, prompts=random_prompts(272), new_tokens=8
        )
    assert report.passed
    assert len(report.checks) == len(cases)
    assert (report.greedy[0].runtime, report.greedy[0].equal_prompts) == ("tensorrt-rtx", 5)


def test_other_weights_do_not_pass(folder: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "other", "llama-biased")
    onnx_from_checkpoint(Checkpoint.open(tmp_path / "other"), tmp_path / "onnx")
    report = compare_runners(
        OrtDecoder(folder, threads=1),
        OrtDecoder(tmp_path / "onnx", threads=1),
        cases=runtime_cases(272),
        tolerance=0.02,
        prompts=random_prompts(272),
        new_tokens=8,
    )
    assert not any(check.passed for check in report.checks)
    assert not report.greedy[0].passed


def test_two_vocabularies_are_two_models(folder: Path) -> None:
    reference = OrtDecoder(folder, threads=1)
    other: Any = SimpleNamespace(runtime="other", vocab_size=10)
    with pytest.raises(NirvanaError, match="other has a vocabulary of 10, onnxruntime-cpu of 272"):
        compare_runners(reference, other, cases=runtime_cases(10), tolerance=1.0, prompts=[])


def test_what_a_gpu_rounds_is_allowed_and_no_more() -> None:
    half, coarse = device_tolerance("fp16", layers=30), device_tolerance("bf16", layers=30)
    assert device_tolerance("fp32", layers=30) == half == pytest.approx(4 * 2**-11 * np.sqrt(14 * 30))
    assert device_tolerance("fp16", layers=30, quantization="int8") == coarse == pytest.approx(8 * half)
    assert device_tolerance("fp16", layers=30, quantization="w8") == half
