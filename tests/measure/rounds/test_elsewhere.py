"""Times of other runtimes that a benchmark keeps, and those that it drops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nirvana_deploy.measure.rounds.elsewhere import KEPT, earlier_benchmark, with_other_runtimes


def of(runtime: str, ms: float, **workload: int) -> dict[str, Any]:
    times = {"p50": ms, "samples": [ms, ms]}
    return {
        "environment": {"cpu": "a CPU"},
        "workload": {"prompt_tokens": 8, "new_tokens": 4, "batch_size": 1, "threads": 1, **workload},
        "variants": [{"name": "dense", "runtime": runtime, "prefill_ms": times, "tpot_ms": times}],
    }


def test_each_runtime_keeps_the_times_it_had_last() -> None:
    first = with_other_runtimes(of("a", 1.0), None)
    assert KEPT not in first
    second = with_other_runtimes(of("b", 2.0), first)
    third = with_other_runtimes(of("c", 3.0), second)
    kept = {one["runtime"]: one["variants"]["dense"]["tpot_ms"] for one in third[KEPT]}
    assert kept == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    again = with_other_runtimes(of("a", 9.0), third)
    assert {one["runtime"] for one in again[KEPT]} == {"b", "c"}


@pytest.mark.parametrize("change", [{"prompt_tokens": 9}, {"threads": 2}])
def test_nothing_is_kept_of_another_request(change: dict[str, int]) -> None:
    assert KEPT not in with_other_runtimes(of("b", 2.0, **change), of("a", 1.0))


def test_a_damaged_record_does_not_keep_a_benchmark_from_being_made(tmp_path: Path) -> None:
    file = tmp_path / "benchmark.json"
    assert earlier_benchmark(file) is None
    file.write_text(json.dumps({"variants": [{"parameters": 1}]}))
    assert earlier_benchmark(file) is None
    file.write_text(json.dumps(of("a", 1.0)))
    assert earlier_benchmark(file) == of("a", 1.0)
