"""Contenders are timed in turn; one that fails is told with its reason and takes no other with it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from builders.tiny_decoder import VOCAB, write_tiny_decoder
from numpy.typing import NDArray

from nirvana_deploy.base.errors import ContenderError, NirvanaError
from nirvana_deploy.base.reading import typed
from nirvana_deploy.measure.benchmark import alternate
from nirvana_deploy.measure.contest.contender import Contender, require_model, require_runtime, runtime_of
from nirvana_deploy.measure.contest.timing import require_all_timed, require_rounds, time_contenders
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.rounds import watch
from nirvana_deploy.measure.worker import RoundSample
from nirvana_deploy.output.record_kinds import ContestRecord
from nirvana_deploy.runtime.table import RUNTIMES, Runtime

SHORT = Workload(prompt_tokens=4, new_tokens=3, repeats=6, warmup=1, threads=1)


def contender(path: Path, name: str) -> Contender:
    return Contender(name, path, runtime_of(path, None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_decoder(tmp_path_factory.mktemp("tiny") / "onnx")


class Runner:
    """A runner that dies in one of its rounds."""

    def __init__(self, dies_in: int | None) -> None:
        self.rounds, self.dies_in = 0, dies_in

    def measure(self, tokens: NDArray[np.int64], *, new_tokens: int) -> RoundSample:
        self.rounds += 1
        if self.rounds == self.dies_in:
            raise NirvanaError("It died.")
        return RoundSample(prefill_ms=1.0, ttft_ms=1.0, itl_ms=(1.0,) * (new_tokens - 1))


def test_the_rounds_go_on_without_one_that_dies() -> None:
    runners = {"a": Runner(None), "b": Runner(3), "c": Runner(None)}
    lost: dict[str, NirvanaError] = {}
    samples = alternate(runners, workload=SHORT, vocab_size=7, lost=lost)
    assert {name: len(of_one) for name, of_one in samples.items()} == {"a": 6, "c": 6}
    assert runners["b"].rounds == 3 and lost["b"].message == "It died."
    with pytest.raises(NirvanaError, match="It died"):
        alternate({"a": Runner(2)}, workload=SHORT, vocab_size=7)


def test_a_contender_that_does_not_load_stands_in_the_record_with_its_reason(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    record = time_contenders(
        [contender(tmp_path, "broken"), contender(folder, "one"), contender(folder, "one (2)")],
        workload=SHORT,
        cautions=["Said before."],
    )
    assert typed(record, ContestRecord, "the record") is record
    assert [one["name"] for one in record["variants"]] == ["one", "one (2)"]
    (compared,) = record["comparisons"]
    assert (compared["variant"], compared["baseline"]) == ("one (2)", "one")
    interval = compared["tpot_speedup_interval"]
    assert interval["low"] <= compared["tpot_speedup"] <= interval["high"]
    (failed,) = record["failed"]
    assert failed["name"] == "broken" and "model.onnx cannot be loaded" in failed["reason"]
    assert record["cautions"][0] == "Said before."
    assert record["cautions"][1].startswith("broken failed: ratios are to one,")
    with pytest.raises(ContenderError, match="1 of 3 models failed: broken") as error:
        require_all_timed(record)
    assert error.value.exit_code == 3
    assert record["workload"]["threads"] == 1 and record["variants"][0]["weights_bytes"] > 0


def test_a_contender_that_is_killed_loses_nobody_elses_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second worker is killed when the first counted round is over."""

    class Killing(watch.Watch):
        def sample(self) -> Any:
            if len(self.samples) == 1:
                children = sorted(psutil.Process().children(), key=lambda one: one.pid)
                os.kill(
                    [one for one in children if "worker" in " ".join(one.cmdline())][1].pid, signal.SIGKILL
                )
            return super().sample()

    monkeypatch.setattr(watch, "Watch", Killing)
    names = ["a", "b", "c"]
    record = time_contenders([contender(folder, name) for name in names], workload=SHORT)
    assert [one["name"] for one in record["variants"]] == ["a", "c"]
    assert all(len(one["tpot_ms"]["samples"]) == 6 for one in record["variants"])
    assert record["watch"]["samples"][0]["read_gb_per_s"] > 0
    assert "was ended by SIGKILL" in record["failed"][0]["reason"]
    assert [one["variant"] for one in record["comparisons"]] == ["c"]


def test_where_all_fail_the_record_has_nothing_but_reasons(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    record = time_contenders([contender(tmp_path, "a"), contender(tmp_path, "b")], workload=SHORT)
    assert record["variants"] == record["comparisons"] == [] and len(record["failed"]) == 2


def test_vocabularies_that_differ_are_not_timed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builders.tiny_decoder.VOCAB", VOCAB + 1)
    wider = write_tiny_decoder(tmp_path / "wider")
    with pytest.raises(
        NirvanaError, match=r"Not the same model: a has a vocabulary of 11 tokens, and b has .*12"
    ):
        time_contenders([contender(folder, "a"), contender(wider, "b")], workload=SHORT)


def test_few_rounds_are_refused_or_said(folder: Path) -> None:
    one = [contender(folder, "a"), contender(folder, "b")]
    with pytest.raises(NirvanaError, match="1 measured round tells no difference"):
        time_contenders(one, workload=Workload(repeats=1))
    require_rounds(Workload(repeats=1, precision=0.03))  # as the hint says
    record = time_contenders(one, workload=Workload(prompt_tokens=2, new_tokens=2, repeats=2, threads=1))
    assert record["cautions"] == ["2 rounds show no difference with a confidence of 95%: six may."]
    assert record["comparisons"][0]["shows_difference"] == {"prefill": False, "ttft": False, "tpot": False}


def test_a_runtime_that_is_missing_is_named_with_its_pip_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, extra in (("nowhere", "llama-cpp"), ("elsewhere", None)):
        row = Runtime(name, takes="onnx", opens="x:y", module="not_there", extra=extra, fix="pip install it")
        monkeypatch.setitem(RUNTIMES, name, row)
        with pytest.raises(NirvanaError, match="Timing it needs the package 'not-there'") as error:
            require_runtime(Contender("it", folder, name))
        assert ("[llama-cpp]" if extra else "pip install it") in str(error.value.hint)


def test_what_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    require_model(folder)
    with pytest.raises(NirvanaError, match="is nothing that can be timed"):
        require_model(tmp_path)
    with pytest.raises(NirvanaError, match="is the graph alone") as error:
        require_model(folder / "model.onnx")
    assert str(folder) in str(error.value.hint)


def test_a_named_runtime_runs_what_it_takes_and_nothing_else(folder: Path) -> None:
    assert runtime_of(folder, "onnxruntime-cuda") == "onnxruntime-cuda"
    assert runtime_of(folder, "llama-cpp") == "onnxruntime-cpu"
    assert runtime_of(Path("x.gguf"), "onnxruntime-cuda") == "llama-cpp"
