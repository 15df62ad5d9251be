"""Models in turn: every one answers the same before the next is asked, in an order that flips.

A machine that warms up or gets busy slows all of them alike, and the ratio of two models is taken within
one turn, whose prompts they share: one batch of requests, or one round of them at servers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.measure.benchmark import Timed, prompt_of
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.rounds.watch import Watch
from nirvana_deploy.measure.worker import RoundSample
from nirvana_deploy.measure.workloads.energy import EnergyMeter
from nirvana_deploy.measure.workloads.named import NamedWorkload, Request, Round
from nirvana_deploy.measure.workloads.server import ServedSample


@dataclass(frozen=True)
class Answered:
    """One model's answer to one request."""

    request: Request
    sample: RoundSample | ServedSample
    joules: float | None
    """Used by the processor meanwhile, by whatever program; None where nothing tells."""


@dataclass(frozen=True)
class AnsweredRound:
    """What the server of one model answered to one round of requests."""

    answers: tuple[Answered, ...]
    """Without their energy: they share the processor."""
    seconds: float
    """From the first request sent until the last one is answered."""
    joules: float | None
    """Used by the processor meanwhile, by whatever program; None where nothing tells."""


class Clients(Protocol):
    """What can be asked several requests at a time: a server, or its stand-in."""

    def answer_all(
        self, asked: Sequence[tuple[NDArray[np.int64], int]], *, clients: int
    ) -> tuple[list[ServedSample], float]:
        """Answer each (prompt [T], new tokens); also returns the seconds that all took."""
        ...


Asked = TypeVar("Asked")
Turn = TypeVar("Turn", Request, Round)
Answer = TypeVar("Answer")


def in_turns(
    runners: Mapping[str, Timed],
    requests: Sequence[Request],
    *,
    warmup: Sequence[Request],
    vocab_size: int,
    label: str,
    lost: MutableMapping[str, NirvanaError],
    watch: Watch | None = None,
    meter: EnergyMeter | None = None,
    progress: Progress = SILENT,
) -> dict[str, list[Answered]]:
    """Ask every runner each request; what it answers to ``warmup``, asked first, is not kept.

    A runner that fails goes into ``lost`` with its error, and has no answers. Raises NirvanaError for no
    request at all.
    """
    if not requests:
        raise NirvanaError(f"{label}: there is no request to time.")

    def ask(runner: Timed, request: Request) -> RoundSample:
        return runner.measure(_prompts(request, vocab_size), new_tokens=request.new_tokens)

    turns, counted = (*warmup, *requests), len(requests)
    found = _taken(runners, turns, ask, label=label, lost=lost, watch=watch, meter=meter, progress=progress)
    return {
        name: [Answered(request, *one) for request, one in zip(requests, of_one[-counted:], strict=True)]
        for name, of_one in found.items()
    }


def in_rounds(
    servers: Mapping[str, Clients],
    workload: NamedWorkload,
    *,
    vocab_size: int,
    lost: MutableMapping[str, NirvanaError],
    watch: Watch | None = None,
    meter: EnergyMeter | None = None,
    progress: Progress = SILENT,
) -> dict[str, list[AnsweredRound]]:
    """Ask every server each round of a workload; as many of the longest requests, asked first, are not kept.

    A server that fails goes into ``lost`` with its error, and has no answers.
    """
    rounds, clients = workload.rounds(), workload.at_a_time

    def ask(server: Clients, one: Round) -> tuple[list[ServedSample], float]:
        asked = [(_prompts(request, vocab_size)[0], request.new_tokens) for request in one.requests]
        return server.answer_all(asked, clients=clients)

    turns = (workload.warmup_round(), *rounds)
    found = _taken(
        servers, turns, ask, label=workload.name, lost=lost, watch=watch, meter=meter, progress=progress
    )
    return {
        name: [
            AnsweredRound(tuple(map(_without_energy, one.requests, samples)), seconds, joules)
            for one, ((samples, seconds), joules) in zip(rounds, of_one[1:], strict=True)
        ]
        for name, of_one in found.items()
    }


def _taken(
    runners: Mapping[str, Asked],
    turns: Sequence[Turn],
    ask: Callable[[Asked, Turn], Answer],
    *,
    label: str,
    lost: MutableMapping[str, NirvanaError],
    watch: Watch | None,
    meter: EnergyMeter | None,
    progress: Progress,
) -> dict[str, list[tuple[Answer, float | None]]]:
    """What each runner answers in every turn, with the joules; those that fail go into ``lost``."""
    answers: dict[str, list[tuple[Answer, float | None]]] = {name: [] for name in runners}
    with progress.task(label, len(turns) * len(runners)) as advance:
        for turn in turns:
            for name in list(answers) if turn.index % 2 == 0 else reversed(list(answers)):
                before = meter.read() if meter is not None else None
                try:
                    answer = ask(runners[name], turn)
                except NirvanaError as error:
                    lost[name] = error
                    del answers[name]
                    continue
                joules = meter.joules(before, meter.read()) if meter is not None else None
                answers[name].append((answer, joules))
                advance(1)
            if watch is not None:
                watch.sample()
    return answers


def _prompts(request: Request, vocab_size: int) -> NDArray[np.int64]:
    """Token ids [N, T], which index and seed of the request decide."""
    asked = Workload(prompt_tokens=request.prompt_tokens, batch_size=request.batch_size, seed=request.seed)
    return prompt_of(asked, request.index, vocab_size=vocab_size)


def _without_energy(request: Request, sample: ServedSample) -> Answered:
    return Answered(request, sample, None)
