"""The tables of a contest, for a terminal and a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.base.units import format_bytes, format_ms, format_number
from nirvana_deploy.report.table import ABSENT, NO_DIFFERENCE, TIMES, Table, format_times, median_of

REFERENCE, FAILED = "reference", "failed"
_HEADERS = (
    "Contender",
    "Runtime",
    "TTFT",
    "TPOT",
    "Decode, times as fast",
    "Prefill, times as fast",
    "Decode, tokens/s",
    "Prefill, tokens/s",
    "Weights",
    "Peak memory",
)
_EN_DASH = "\N{EN DASH}"
_REASON_CHARACTERS = 300


def contest_table(record: Mapping[str, Any]) -> Table:
    """A row for each contender of a ContestRecord: medians, and how much faster than the reference."""
    empty = (ABSENT,) * (len(_HEADERS) - 2)
    rows = [
        *(_row(record, variant) for variant in record["variants"]),
        *((one["name"], FAILED, *empty) for one in record["failed"]),
    ]
    return Table(_HEADERS, tuple(rows))


def failed_table(record: Mapping[str, Any]) -> Table:
    """Why each of those that failed did."""
    rows = [(one["name"], one["runtime"] or ABSENT, _brief(one["reason"])) for one in record["failed"]]
    return Table(("Failed", "Runtime", "Reason"), tuple(rows))


def rounds_line(record: Mapping[str, Any]) -> str:
    """What was timed, and what of it does not count."""
    asked = record["workload"]
    measured = max((len(one["tpot_ms"]["samples"]) for one in record["variants"]), default=0)
    batch = f", batch of {asked['batch_size']}" if asked["batch_size"] > 1 else ""
    return (
        f"{_counted(measured, 'round')} in turn, each contender in its own process, "
        f"{_counted(asked['warmup'], 'round')} of warm-up left out; a prompt of "
        f"{_counted(asked['prompt_tokens'], 'token')}, {asked['new_tokens']:,} decoded{batch}, "
        f"{_counted(asked['threads'], 'thread')}. Medians over rounds; ratios are paired by round, with the "
        "interval of 95 % confidence in brackets."
    )


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _row(record: Mapping[str, Any], variant: Mapping[str, Any]) -> tuple[str, ...]:
    compared: Mapping[str, Any] | None = next(
        (one for one in record["comparisons"] if one["variant"] == variant["name"]), None
    )
    peak = format_bytes(variant["peak_rss_bytes"])
    if variant["peak_device_bytes"] is not None:
        peak += f", {format_bytes(variant['peak_device_bytes'])} on the device"
    ttft, tpot = (median_of(variant, f"{metric}_ms") or 0.0 for metric in ("ttft", "tpot"))
    return (
        variant["name"],
        variant["runtime"],
        format_ms(ttft),
        format_ms(tpot),
        _speed(compared, "tpot"),
        _speed(compared, "prefill"),
        format_number(variant["decode_tokens_per_s"]),
        format_number(variant["prefill_tokens_per_s"]),
        format_bytes(variant["weights_bytes"]),
        peak,
    )


def _speed(compared: Mapping[str, Any] | None, metric: str) -> str:
    if compared is None:
        return REFERENCE
    found = compared[f"{metric}_speedup_interval"]
    low, high = (format_number(found[end]) for end in ("low", "high"))
    if not compared["shows_difference"][metric]:
        return f"{NO_DIFFERENCE} ({low}{_EN_DASH}{high}{TIMES})"
    return f"{format_times(found['p50'])} ({low}{_EN_DASH}{high})"


def _brief(reason: str) -> str:
    """The first line of a reason, and the last one of a trace."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()] or [""]
    said = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return said if len(said) <= _REASON_CHARACTERS else f"{said[: _REASON_CHARACTERS - 3]}..."
