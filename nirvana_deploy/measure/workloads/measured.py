"""Numbers of a workload or a sweep; definitions and their sources stand in docs/howto/workloads.md.

TPOT = (E2E - TTFT) / (new tokens - 1) of one request; ITL pools the gaps of all requests. Throughput counts
the requests, or tokens, of all sequences per second of the model's own time: the sum of E2E over its batches,
without the turns of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nirvana_deploy.measure.benchmark import Variant, summary
from nirvana_deploy.measure.bounds import Work
from nirvana_deploy.measure.rounds.ratios import ratio_of
from nirvana_deploy.measure.workloads.named import Request
from nirvana_deploy.measure.workloads.turns import Answered

COMPARED = ("ttft_ms", "tpot_ms", "e2e_ms")
"""What the ratio to the baseline is taken of, request by request."""
_POINT = ("prefill_ms", "ttft_ms", "tpot_ms")
"""What a curve shows."""


def times_of(answers: Sequence[Answered]) -> dict[str, Any]:
    """Percentiles of TTFT, TPOT, ITL and E2E in ms, throughput, energy, and every request."""
    samples = [answer.sample for answer in answers]
    requests = [answer.request for answer in answers]
    seconds = sum(sample.e2e_ms for sample in samples) / 1e3
    count = sum(request.batch_size for request in requests)
    read = sum(request.batch_size * request.prompt_tokens for request in requests)
    written = sum(request.batch_size * request.new_tokens for request in requests)
    known = [answer.joules for answer in answers if answer.joules is not None]
    joules = sum(known) if len(known) == len(answers) else None
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
    return [
        {"variant": name, "baseline": baseline, **_speedups(answers[baseline], found, COMPARED)}
        for name, found in answers.items()
        if baseline in answers and name != baseline
    ]


def _speedups(
    before: Sequence[Answered], after: Sequence[Answered], metrics: Sequence[str]
) -> dict[str, Any]:
    found = {}
    for metric in metrics:
        ratio = ratio_of(*([getattr(one.sample, metric) for one in some] for some in (before, after)))
        found[f"{metric.removesuffix('_ms')}_speedup"] = asdict(ratio)
    return found


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


def identity_of(variant: Variant) -> dict[str, Any]:
    """What a record says of a model itself."""
    return {
        "name": variant.name,
        "path": str(variant.path),
        "parameters": variant.parameters,
        "float_arithmetic": variant.float_arithmetic,
    }
