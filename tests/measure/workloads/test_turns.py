"""Requests in turn: who is asked when, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.measure.worker import RoundSample
from nirvana_deploy.measure.workloads.energy import EnergyMeter
from nirvana_deploy.measure.workloads.named import NamedWorkload, Request, WorkloadFile
from nirvana_deploy.measure.workloads.server import ServedSample
from nirvana_deploy.measure.workloads.turns import in_rounds, in_turns


class Asked:
    """Remembers who was asked for how much, and uses a joule each time."""

    def __init__(self, name: str, log: list[str], counter: Path | None = None) -> None:
        self.name, self.log, self.counter = name, log, counter
        self.prompts: list[NDArray[np.int64]] = []

    def measure(self, tokens: NDArray[np.int64], *, new_tokens: int) -> RoundSample:
        self.log.append(f"{self.name}{tokens.shape[0]}x{tokens.shape[1]}+{new_tokens}")
        self.prompts.append(tokens)
        if self.counter is not None:
            self.counter.write_text(str(int(self.counter.read_text()) + 1_000_000))
        return RoundSample(prefill_ms=1, ttft_ms=2, itl_ms=(3.0,) * (new_tokens - 1))


REQUESTS = [Request(2, 3, 4, seed=0, index=0), Request(2, 5, 2, seed=0, index=1)]


def test_each_request_goes_to_all_and_the_order_flips() -> None:
    log: list[str] = []
    runners = {name: Asked(name, log) for name in "ab"}
    warmup = [Request(2, 6, 6, seed=0, index=2)]
    answers = in_turns(runners, REQUESTS, warmup=warmup, vocab_size=7, label="x", lost={})
    assert log == ["a2x6+6", "b2x6+6", "a2x3+4", "b2x3+4", "b2x5+2", "a2x5+2"]
    assert [one.request for one in answers["a"]] == REQUESTS == [one.request for one in answers["b"]]
    assert {one.joules for one in answers["a"]} == {None}
    for one, other in zip(runners["a"].prompts, runners["b"].prompts, strict=True):
        np.testing.assert_array_equal(one, other)


def test_energy_is_counted_for_the_one_that_was_asked(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for file, text in (("name", "package-0"), ("energy_uj", "0"), ("max_energy_range_uj", "100000000")):
        (zone / file).write_text(text)
    log: list[str] = []
    runners = {"busy": Asked("busy", log, zone / "energy_uj"), "idle": Asked("idle", log)}
    answers = in_turns(
        runners, REQUESTS, warmup=[], vocab_size=7, label="x", lost={}, meter=EnergyMeter(tmp_path)
    )
    assert [one.joules for one in answers["busy"]] == [1, 1]
    assert [one.joules for one in answers["idle"]] == [0, 0]


def test_one_that_dies_loses_nobody_elses_answers() -> None:
    class Dies(Asked):
        def measure(self, tokens: NDArray[np.int64], *, new_tokens: int) -> RoundSample:
            if self.prompts:
                raise NirvanaError("It died.")
            return super().measure(tokens, new_tokens=new_tokens)

    log: list[str] = []
    lost: dict[str, NirvanaError] = {}
    runners = {"a": Asked("a", log), "b": Dies("b", log), "c": Asked("c", log)}
    answers = in_turns(runners, [*REQUESTS, *REQUESTS], warmup=[], vocab_size=7, label="x", lost=lost)
    assert {name: len(of_one) for name, of_one in answers.items()} == {"a": 4, "c": 4}
    assert lost["b"].message == "It died."


def test_no_request_is_an_error() -> None:
    with pytest.raises(NirvanaError, match="chat: there is no request to time"):
        in_turns({}, [], warmup=[], vocab_size=7, label="chat", lost={})


class Serves:
    """A server that remembers who was asked for how much, and dies in one of its rounds."""

    def __init__(self, name: str, log: list[str], dies_in: int = 0) -> None:
        self.name, self.log, self.dies_in, self.rounds = name, log, dies_in, 0
        self.prompts: list[NDArray[np.int64]] = []

    def answer_all(
        self, asked: Sequence[tuple[NDArray[np.int64], int]], *, clients: int
    ) -> tuple[list[ServedSample], float]:
        self.rounds += 1
        if self.rounds == self.dies_in:
            raise NirvanaError("It died.")
        self.log.append(f"{self.name}{len(asked)}/{clients}")
        self.prompts += [prompt for prompt, _ in asked]
        return [ServedSample(2, (3.0,) * (new - 1)) for _, new in asked], 0.5


def test_servers_take_turns_in_rounds_of_the_same_requests() -> None:
    file = WorkloadFile(prompt_tokens=(3, 5), new_tokens=(2, 4), requests=7, concurrency=2)
    workload, log, lost = NamedWorkload("x", file), list[str](), dict[str, NirvanaError]()
    servers = {"a": Serves("a", log), "b": Serves("b", log), "c": Serves("c", log, dies_in=2)}
    rounds = in_rounds(servers, workload, vocab_size=7, lost=lost)
    assert log == ["a2/2", "b2/2", "c2/2", "a2/2", "b2/2", "b2/2", "a2/2", "a3/2", "b3/2"]
    assert list(rounds) == ["a", "b"] and lost["c"].message == "It died."
    for found in rounds.values():
        answers = [answer for one in found for answer in one.answers]
        assert tuple(answer.request for answer in answers) == workload.timed()
        assert all(len(one.sample.itl_ms) == one.request.new_tokens - 1 for one in answers)
        assert [(one.seconds, one.joules) for one in found] == [(0.5, None)] * 3
    for one, other in zip(servers["a"].prompts, servers["b"].prompts, strict=True):
        np.testing.assert_array_equal(one, other)
    lengths = [len(prompt) for prompt in servers["a"].prompts]
    assert lengths == [5, 5, *(request.prompt_tokens for request in workload.timed())]
