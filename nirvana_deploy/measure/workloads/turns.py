"""Requests in turn: every model answers one before the next is asked, in an order that flips.

A machine that warms up or gets busy slows all of them alike, and the ratio of two models is taken within
one request, whose prompts they share.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.measure.benchmark import Timed, prompt_of
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.rounds.watch import Watch
from nirvana_deploy.measure.worker import RoundSample
from nirvana_deploy.measure.workloads.energy import EnergyMeter
from nirvana_deploy.measure.workloads.named import Request


@dataclass(frozen=True)
class Answered:
    """One model's answer to one request."""

    request: Request
    sample: RoundSample
    joules: float | None
    """Used by the processor meanwhile, by whatever program; None where nothing tells."""


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
    answers: dict[str, list[Answered]] = {name: [] for name in runners}
    with progress.task(label, (len(warmup) + len(requests)) * len(runners)) as advance:
        for turn, request in enumerate((*warmup, *requests)):
            tokens = prompt_of(_as_round(request), request.index, vocab_size=vocab_size)
            for name in list(answers) if request.index % 2 == 0 else reversed(list(answers)):
                before = meter.read() if meter is not None else None
                try:
                    sample = runners[name].measure(tokens, new_tokens=request.new_tokens)
                except NirvanaError as error:
                    lost[name] = error
                    del answers[name]
                    continue
                joules = meter.joules(before, meter.read()) if meter is not None else None
                if turn >= len(warmup):
                    answers[name].append(Answered(request, sample, joules))
                advance(1)
            if watch is not None:
                watch.sample()
    return answers


def _as_round(request: Request) -> Workload:
    return Workload(prompt_tokens=request.prompt_tokens, batch_size=request.batch_size, seed=request.seed)
