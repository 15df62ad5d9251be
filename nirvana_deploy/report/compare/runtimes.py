"""The models of a folder in several runtimes, and where another one than the benchmark's is faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from nirvana_deploy.base.units import format_ms
from nirvana_deploy.measure.rounds.elsewhere import KEPT, runtime_of, timed_variants
from nirvana_deploy.measure.rounds.ratios import Ratio, ratio_of_runs
from nirvana_deploy.report.table import ABSENT, Table, format_times

_METRICS = {"tpot_ms": "decodes", "prefill_ms": "reads the prompt"}


@dataclass(frozen=True)
class RuntimesSection:
    """What a report says of other runtimes."""

    says: str
    table: Table


def runtimes_section(benchmark: Mapping[str, Any]) -> RuntimesSection | None:
    """The section of a benchmark.json; None where it knows one runtime."""
    if not benchmark.get(KEPT) or not benchmark.get("variants"):
        return None
    here = runtime_of(benchmark)
    headers = ("Model", "Runtime", "Decode, per token", f"Times {here}", "Prefill", f"Times {here}")
    return RuntimesSection(" ".join(_says(benchmark, here)), Table(headers, tuple(_rows(benchmark, here))))


def _rows(benchmark: Mapping[str, Any], here: str) -> Iterator[tuple[str, ...]]:
    for variant in timed_variants(benchmark):
        cells = [(format_ms(variant[metric]["p50"]), ABSENT) for metric in _METRICS]
        yield (variant["name"], here, *(cell for pair in cells for cell in pair))
        for runtime, times in _elsewhere(benchmark, variant["name"]):
            shown = [variant["name"], runtime]
            for metric in _METRICS:
                shown += [format_ms(median(times[metric])), _told(_ratio(variant, times, metric))]
            yield tuple(shown)


def _says(benchmark: Mapping[str, Any], here: str) -> Iterator[str]:
    """Where another runtime is faster beyond doubt, and how sure that is."""
    found = [
        f"{variant['name']} {does} {_told(ratio)} as fast in {runtime} as in {here}."
        for variant in timed_variants(benchmark)
        for runtime, times in _elsewhere(benchmark, variant["name"])
        for metric, does in _METRICS.items()
        if (ratio := _ratio(variant, times, metric)).shows_difference and ratio.p50 > 1
    ]
    yield from found or [f"No other runtime is beyond doubt faster than {here}."]
    yield "Each runtime was timed in its own run: ratios are of medians, with the intervals of both."


def _elsewhere(benchmark: Mapping[str, Any], variant: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for other in benchmark[KEPT]:
        if variant in other["variants"]:
            yield other["runtime"], other["variants"][variant]


def _ratio(variant: Mapping[str, Any], times: Mapping[str, Any], metric: str) -> Ratio:
    return ratio_of_runs(variant[metric]["samples"], times[metric])


def _told(ratio: Ratio) -> str:
    return f"{format_times(ratio.p50)} ({format_times(ratio.low)} to {format_times(ratio.high)})"
