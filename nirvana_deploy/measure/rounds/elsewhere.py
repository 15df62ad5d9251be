"""Times of a folder's models in other runtimes: an earlier benchmark's, kept beside the new one's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.output.record_kinds import BenchmarkRecord

KEPT = "other_runtimes"
"""The key of benchmark.json."""
METRICS = ("prefill_ms", "tpot_ms")
_REQUEST = ("prompt_tokens", "new_tokens", "batch_size", "threads")


def earlier_benchmark(file: Path) -> Mapping[str, Any] | None:
    """The benchmark.json that is about to be replaced; None for one that is not there or damaged."""
    try:
        return read_json(file, BenchmarkRecord)
    except NirvanaError:
        return None


def with_other_runtimes(result: dict[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """``result``, a benchmark.json, with what ``before``, an earlier one, found in other runtimes.

    Nothing of another request or processor is kept: times of the two would not compare.
    """
    if before is None or not before["variants"] or _asked(before) != _asked(result):
        return result
    found = {one["runtime"]: one for one in before.get(KEPT) or ()}
    found[runtime_of(before)] = {
        "runtime": runtime_of(before),
        "variants": {
            one["name"]: {metric: list(one[metric]["samples"]) for metric in METRICS}
            for one in timed_variants(before)
        },
    }
    found.pop(runtime_of(result), None)
    return {**result, KEPT: list(found.values())}


def timed_variants(benchmark: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The models of a benchmark.json that have times of single rounds."""
    return [
        one
        for one in benchmark.get("variants") or ()
        if all((one.get(metric) or {}).get("samples") for metric in METRICS)
    ]


def runtime_of(benchmark: Mapping[str, Any]) -> str:
    """The runtime that a benchmark.json is of."""
    return str(benchmark["variants"][0].get("runtime") or "unknown")


def _asked(benchmark: Mapping[str, Any]) -> tuple[Any, ...]:
    workload, environment = benchmark.get("workload") or {}, benchmark.get("environment") or {}
    return (*(workload.get(key) for key in _REQUEST), environment.get("cpu"))
