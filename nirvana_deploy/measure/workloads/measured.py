"""Numbers of a workload or a sweep; definitions and their sources stand in docs/howto/workloads.md.

TPOT = (E2E - TTFT) / (new tokens - 1) of one request; ITL pools the gaps of all requests. Throughput counts
the requests, or tokens, of all sequences per second of the model's own time, without the turns of the others:
the sum of E2E over its batches, or that of its rounds at a server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, TypeVar

from nirvana_deploy.measure.benchmark import Variant, summary
from nirvana_deploy.measure.bounds import Work
from nirvana_deploy.measure.contest.contender import Contender
from nirvana_deploy.measure.rounds.processes import Model
from nirvana_deploy.measure.rounds.ratios import ratio_of
from nirvana_deploy.measure.workloads.named import Request
from nirvana_deploy.measure.workloads.turns import Answered, AnsweredRound

COMPARED = ("ttft_ms", "tpot_ms", "e2e_ms")
"""What the ratio to the baseline is taken of, request by request."""
_POINT = ("prefill_ms", "ttft_ms", "tpot_ms")
"""What a curve shows."""
Timed = TypeVar("Timed", Answered, AnsweredRound)


def times_of(answers: Sequence[Answered]) -> dict[str, Any]:
    """Percentiles of TTFT, TPOT, ITL and E2E in ms, throughput, energy, and every batch."""
    return _times_of(
        answers,
        seconds=sum(answer.sample.e2e_ms for answer in answers) / 1e3,
        joules=_sum([answer.joules for answer in answers]),
    )


def times_of_rounds(rounds: Sequence[AnsweredRound]) -> dict[str, Any]:
    """The same of what a server answered, and the seconds of every round."""
    answers = [answer for one in rounds for answer in one.answers]
    seconds = [one.seconds for one in rounds]
    found = _times_of(answers, seconds=sum(seconds), joules=_sum([one.joules for one in rounds]))
    turns = [index for index, one in enumerate(rounds) for _ in one.answers]
    batches = [{**batch, "round": turn} for batch, turn in zip(found["batches"], turns, strict=True)]
    return {**found, "batches": batches, "round_seconds": seconds}


def _times_of(answers: Sequence[Answered], *, seconds: float, joules: float | None) -> dict[str, Any]:
    samples = [answer.sample for answer in answers]
    requests = [answer.request for answer in answers]
    count = sum(request.batch_size for request in requests)
    read = sum(request.batch_size * request.prompt_tokens for request in requests)
    written = sum(request.batch_size * request.new_tokens for request in requests)
    return {
        "ttft_ms": _spread([sample.ttft_ms for sample in samples]),
        "tpot_ms": _spread([sample.tpot_ms for sample in samples]),
        "itl_ms": _spread([gap for sample in samples for gap in sample.itl_ms]),
        "e2e_ms": _spread([sample.e2e_ms for sample in samples]),
        "seconds": seconds,
        "requests_per_s": count / seconds,
        "output_tokens_per_s": written / seconds,
        "total_tokens_per_s": (read + written) / seconds,
        "energy_joules": joules,
        "energy_joules_per_output_token": None if joules is None else joules / written,
        "batches": [_batch(answer) for answer in answers],
    }


def _sum(joules: Sequence[float | None]) -> float | None:
    """None where one is not known."""
    known = [one for one in joules if one is not None]
    return sum(known) if len(known) == len(joules) else None


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """A summary without the samples, which stand with their requests."""
    return {key: value for key, value in summary(values).items() if key != "samples"}


def _batch(answer: Answered) -> dict[str, Any]:
    request, sample = answer.request, answer.sample
    return {
        "prompt_tokens": request.prompt_tokens,
        "new_tokens": request.new_tokens,
        "ttft_ms": sample.ttft_ms,
        "itl_ms": list(sample.itl_ms),
        "energy_joules": answer.joules,
    }


def comparisons_of(answers: Mapping[str, Sequence[Answered]], baseline: str) -> list[dict[str, Any]]:
    """Times of ``baseline`` over those of every other model, request by request, each with its interval."""
    return _compared(answers, baseline, lambda before, after: _speedups(before, after, COMPARED))


def comparisons_of_rounds(
    rounds: Mapping[str, Sequence[AnsweredRound]], baseline: str
) -> list[dict[str, Any]]:
    """The same of servers, round by round: the requests of one wait for each other, and are one sample.

    A round's time is the mean over its requests. ``rate_speedup`` is of the seconds that it took, so of the
    requests per second.
    """
    return _compared(rounds, baseline, _speedups_of_rounds)


def _compared(
    found: Mapping[str, Sequence[Timed]],
    baseline: str,
    speedups: Callable[[Sequence[Timed], Sequence[Timed]], dict[str, Any]],
) -> list[dict[str, Any]]:
    return [
        {"variant": name, "baseline": baseline, **speedups(found[baseline], of_one)}
        for name, of_one in found.items()
        if baseline in found and name != baseline
    ]


def _speedups(
    before: Sequence[Answered], after: Sequence[Answered], metrics: Sequence[str]
) -> dict[str, Any]:
    return {
        _ratio_name(metric): asdict(
            ratio_of(*([getattr(one.sample, metric) for one in some] for some in (before, after)))
        )
        for metric in metrics
    }


def _speedups_of_rounds(before: Sequence[AnsweredRound], after: Sequence[AnsweredRound]) -> dict[str, Any]:
    found = {
        _ratio_name(metric): asdict(ratio_of(*(_means(some, metric) for some in (before, after))))
        for metric in COMPARED
    }
    rate = ratio_of(*([one.seconds for one in some] for some in (before, after)))
    return {**found, "rate_speedup": asdict(rate)}


def _means(rounds: Sequence[AnsweredRound], metric: str) -> list[float]:
    return [fmean(getattr(answer.sample, metric) for answer in one.answers) for one in rounds]


def _ratio_name(metric: str) -> str:
    return f"{metric.removesuffix('_ms')}_speedup"


def points_of(
    by_value: Mapping[int, Mapping[str, Sequence[Answered]]], baseline: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A curve for each model, and for each but ``baseline`` its ratios along the curve."""
    names = list(next(iter(by_value.values())))
    curves = [
        {"name": name, "points": [{"value": v, **_point(found[name])} for v, found in by_value.items()]}
        for name in names
    ]
    ratios = [
        {
            "variant": name,
            "baseline": baseline,
            "points": [
                {"value": v, **_speedups(found[baseline], found[name], _POINT)}
                for v, found in by_value.items()
            ],
        }
        for name in names
        if baseline in names and name != baseline
    ]
    return curves, ratios


def _point(answers: Sequence[Answered]) -> dict[str, Any]:
    return {metric: summary([getattr(one.sample, metric) for one in answers]) for metric in _POINT}


def kv_cache_bytes(work: Work, longest: Request) -> int:
    """Bytes of keys and values at the end of the ``longest`` batch, as the graph stores them."""
    if work.encoder_decoder:
        own = longest.batch_size * longest.new_tokens * work.kv_cache_bytes_per_token
        return own + longest.batch_size * longest.prompt_tokens * work.footprint.cross_cache_bytes_per_token
    return longest.written_tokens * work.kv_cache_bytes_per_token


def identity_of(model: Model) -> dict[str, Any]:
    """What a record says of a model itself."""
    found = {"name": model.name, "path": str(model.path)}
    if isinstance(model, Variant):
        return {**found, "parameters": model.parameters, "float_arithmetic": model.float_arithmetic}
    if isinstance(model, Contender):
        return {**found, "runtime_version": model.runtime_version}
    return found
