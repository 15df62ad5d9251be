"""Tables of workloads and sweeps."""

from __future__ import annotations

import copy
from typing import Any

from builders.reports import frozen

from nirvana_deploy.report.pages.workloads import (
    UNREADABLE,
    explain,
    explain_sweep,
    sweep_figure,
    sweep_table,
    workload_table,
    workloads_table,
)


def workload(**changes: Any) -> dict[str, Any]:
    return {**frozen("workloads")["workloads"][0], **changes}


def cells(record: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {label: tuple(values) for label, *values in workload_table(record).rows}


def test_energy_is_told_or_said_to_be_unreadable() -> None:
    record = copy.deepcopy(workload())
    assert cells(record)["Energy per output token"] == (UNREADABLE, UNREADABLE)
    record["variants"][1]["energy_joules_per_output_token"] = 0.1234
    assert cells(record)["Energy per output token"] == (UNREADABLE, "0.123 J")


def test_times_of_a_row_share_a_unit() -> None:
    record = copy.deepcopy(workload())
    record["variants"][0]["e2e_ms"] |= {"p50": 2000, "p90": 900, "p95": 2100, "p99": 2200}
    assert cells(record)["Whole request"][0] == "2.00 s (0.900, 2.10, 2.20)"


def test_too_few_requests_have_no_interval() -> None:
    record = copy.deepcopy(workload())
    record["comparisons"][0]["tpot_speedup"] = {"p50": 1.5, "low": 1.5, "high": 1.5, "confidence": 0}
    dense, pruned = cells(record)["Speed-up, per output token"]
    assert dense == "—" and pruned == "no difference shown (too few for an interval)"
    record["comparisons"][0]["tpot_speedup"] |= {"low": 0.9, "confidence": 0.98}
    assert cells(record)["Speed-up, per output token"][1] == "no difference shown (0.900 to 1.50)"


def test_one_request_and_batches_are_told() -> None:
    record = copy.deepcopy(workload())
    record["file"] |= {"requests": 1, "about": ""}
    assert explain(record) == "1 request: prompts of 32 to 128 tokens, answers of 8."
    record["file"] |= {"requests": 64, "batch_size": 8, "about": "Offline."}
    assert explain(record).startswith("Offline. 64 requests in batches of 8: prompts")


def test_clients_of_servers_are_told_with_the_ratio_of_their_rate() -> None:
    record = copy.deepcopy(workload())
    record["file"] |= {"requests": 1200, "concurrency": 4, "about": ""}
    for one in record["variants"]:
        one |= {"round_seconds": [1.0] * 6, "slots": 4}
    assert explain(record).startswith(
        "1,200 requests, 4 open at a time at a server of each model, in 6 rounds in turn: prompts of"
    )
    assert "Speed-up, requests per second" not in cells(record)
    record["comparisons"][0]["rate_speedup"] = {"p50": 1.5, "low": 1.4, "high": 1.6, "confidence": 0.97}
    assert cells(record)["Speed-up, requests per second"][1].startswith("1.50\N{MULTIPLICATION SIGN} (1.40")
    assert cells(record)["Answers written at a time"] == ("4", "4")


def test_a_single_model_has_no_speed_ups() -> None:
    record = copy.deepcopy(workload())
    record["variants"], record["comparisons"] = record["variants"][:1], []
    assert workload_table(record).headers[1:] == ("dense",)
    assert not any("Speed-up" in label for label in cells(record))


def test_a_sweep_has_a_row_for_each_value_and_model() -> None:
    (sweep,) = frozen("workloads")["sweeps"]
    table = sweep_table(sweep)
    assert [row[:2] for row in table.rows[:3]] == [("128", "dense"), ("128", "pruned"), ("512", "dense")]
    assert table.rows[1][2].endswith(" ms (1.41\N{MULTIPLICATION SIGN})") and "(" not in table.rows[0][2]
    assert explain_sweep(sweep) == "Batch 1, 2 threads, 8 new tokens, 7 rounds."
    svg = sweep_figure(sweep)
    for word in ("prompt tokens", "2,048", "milliseconds, logarithmic", "dense", "pruned"):
        assert f">{word}<" in svg


def test_a_notebook_gets_all_in_one_table() -> None:
    rows = workloads_table(frozen("workloads")).rows
    assert [row[:2] for row in rows[1:4]] == [
        ("chat", "pruned"),
        ("context 128", "dense"),
        ("context 512", "dense"),
    ]
