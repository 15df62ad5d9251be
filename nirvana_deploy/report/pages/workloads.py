"""Workloads and sweeps, measured: a table for each, and a picture of each curve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator

from nirvana_deploy.base.units import format_bytes, format_ms, format_number
from nirvana_deploy.measure.rounds.ratios import CONFIDENCE, Ratio
from nirvana_deploy.report.drawing import (
    bare,
    colours_of,
    entitle,
    inline_svg,
    legend_below,
    name_axes,
    new_figure,
)
from nirvana_deploy.report.findings import failed
from nirvana_deploy.report.table import ABSENT, NO_DIFFERENCE, Table, format_times, short

UNREADABLE = "not readable here"
"""Energy, where no counter may be read."""
CAPTION = "Medians over rounds; a bar goes from the 10th to the 90th percentile."
_SPREAD = "p50 (p90, p95, p99)"
_LATENCIES = {
    "ttft_ms": "Time to first token",
    "tpot_ms": "Time per output token",
    "itl_ms": "Between tokens",
    "e2e_ms": "Whole request",
}
_SPEEDUPS = {
    "ttft_speedup": "Speed-up, first token",
    "tpot_speedup": "Speed-up, per output token",
    "e2e_speedup": "Speed-up, whole request",
    "rate_speedup": "Speed-up, requests per second",
}
_AXES = {"context": "prompt tokens", "batch": "sequences in a batch", "threads": "threads"}
_DRAWN = {"tpot_ms": "Decode, per token", "ttft_ms": "Time to first token"}
_SPEEDUP_OF = {"tpot_ms": "tpot_speedup", "ttft_ms": "ttft_speedup"}
_LOGARITHMIC_FROM = 10
"""Times that the largest value is the least one."""
_TALLEST = 2
"""Times the largest median that an axis goes; a longer bar is cut."""


def title(workload: Mapping[str, Any]) -> str:
    """The heading over a workload's table."""
    return f"Workload {workload['name']}"


def explain(workload: Mapping[str, Any]) -> str:
    """What such requests are for, and how many and how long they were."""
    file, batches = workload["file"], workload["variants"][0]["batches"]
    lengths = [_range([one[key] for one in batches]) for key in ("prompt_tokens", "new_tokens")]
    count = file["requests"]
    asked = f"{count:,} request{'s' if count > 1 else ''}"
    asked += _how(workload) if count > 1 else ""
    said = f"{asked}: prompts of {lengths[0]} tokens, answers of {lengths[1]}."
    return " ".join(filter(None, (file.get("about"), said)))


def _how(workload: Mapping[str, Any]) -> str:
    """In batches, one by one, or by the clients of a server."""
    clients, size = workload["file"].get("concurrency"), workload["file"]["batch_size"]
    if clients is None:
        return f" in batches of {size:,}" if size > 1 else ", one at a time"
    rounds = len(workload["variants"][0]["round_seconds"])
    return f", {clients:,} open at a time at a server of each model, in {rounds} rounds in turn"


def cautions(measured: Mapping[str, Any]) -> list[str]:
    """What else the machine did while a workload or a sweep was timed, and which models failed."""
    return [*((measured.get("watch") or {}).get("cautions") or ()), *failed(measured)]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def workload_table(workload: Mapping[str, Any]) -> Table:
    """A row for each number, a column for each model."""
    variants = workload["variants"]
    rows = list(_rows(workload, variants))
    return Table((f"Times: {_SPREAD}", *(str(one["name"]) for one in variants)), tuple(rows))


def _rows(workload: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for key, label in _LATENCIES.items():
        yield (label, *(_spread(one[key]) for one in variants))
    ratios = {one["variant"]: one for one in workload["comparisons"]}
    for key, label in _SPEEDUPS.items():
        if any(key in ratio for ratio in ratios.values()):
            yield (label, *(_ratio(ratios.get(one["name"]), key) for one in variants))
    for key, label, write in (
        ("requests_per_s", "Requests per second", format_number),
        ("output_tokens_per_s", "Output tokens per second", format_number),
        ("total_tokens_per_s", "All tokens per second", format_number),
        ("slots", "Answers written at a time", "{:,}".format),
        ("kv_cache_bytes", "KV cache, longest batch", format_bytes),
        ("peak_rss_bytes", "Peak memory (RSS)", format_bytes),
        ("peak_device_bytes", "Peak device memory", format_bytes),
        ("load_ms", "Load time", format_ms),
    ):
        values = [one.get(key) for one in variants]
        if any(value is not None for value in values):
            yield (label, *(ABSENT if value is None else write(value) for value in values))
    energy = [one.get("energy_joules_per_output_token") for one in variants]
    yield (
        "Energy per output token",
        *(UNREADABLE if value is None else f"{format_number(value)} J" for value in energy),
    )


def _spread(latency: Mapping[str, Any]) -> str:
    """p50 with its unit, the others in the same one."""
    p50 = latency["p50"]
    scale, unit = (1, "ms") if p50 < 999.5 else (1000, "s")
    others = [latency.get(key) for key in ("p90", "p95", "p99")]
    said = ", ".join(ABSENT if value is None else format_number(value / scale) for value in others)
    return f"{format_number(p50 / scale)} {unit} ({said})"


def _ratio(comparison: Mapping[str, Any] | None, key: str) -> str:
    if comparison is None:
        return ABSENT
    found = Ratio(**comparison[key])
    between = f"{format_number(found.low)} to {format_number(found.high)}"
    if found.confidence < CONFIDENCE:
        between = "too few for an interval"
    return f"{_shown(found)} ({between})"


def _shown(found: Ratio) -> str:
    return format_times(found.p50) if found.shows_difference else NO_DIFFERENCE


def sweep_title(sweep: Mapping[str, Any]) -> str:
    """The heading over a sweep."""
    return f"Against {_AXES[sweep['axis']]}"


def explain_sweep(sweep: Mapping[str, Any]) -> str:
    """What stayed along the axis."""
    base = sweep["workload"]
    stays = {
        "context": f"prompts of {base['prompt_tokens']:,} tokens",
        "batch": f"batch {base['batch_size']:,}",
        "threads": f"{base.get('threads') or 'all'} threads",
    }
    stays.pop(sweep["axis"])
    said = f"{', '.join(stays.values())}, {base['new_tokens']:,} new tokens, {base['repeats']:,} rounds."
    return said[:1].upper() + said[1:]


def sweep_table(sweep: Mapping[str, Any]) -> Table:
    """A row for each value and model, the first two columns their names; speed-ups in brackets."""
    axis = _AXES[sweep["axis"]]
    ratios = {
        (one["variant"], point["value"]): point for one in sweep["comparisons"] for point in one["points"]
    }
    rows = [
        (
            f"{point['value']:,}",
            str(one["name"]),
            *(_swept(point, ratios, one["name"], key) for key in _DRAWN),
        )
        for points in zip(*(one["points"] for one in sweep["variants"]), strict=False)
        for one, point in zip(sweep["variants"], points, strict=True)
    ]
    return Table((axis[:1].upper() + axis[1:], "Model", *_DRAWN.values()), tuple(rows))


def _swept(
    point: Mapping[str, Any], ratios: Mapping[tuple[str, int], Mapping[str, Any]], name: str, key: str
) -> str:
    written = format_ms(point[key]["p50"])
    ratio = ratios.get((name, point["value"]))
    if ratio is None:
        return written
    return f"{written} ({_shown(Ratio(**ratio[_SPEEDUP_OF[key]]))})"


def sweep_figure(sweep: Mapping[str, Any]) -> str:
    """Draw decode and time to first token against the axis, a line for each model, the baseline grey."""
    variants = sweep["variants"]
    names = [str(one["name"]) for one in variants]
    colours = colours_of(names, names[0])
    figure = new_figure(5.0)
    panels = figure.subplots(2, 1, sharex=True)
    values = [point["value"] for point in variants[0]["points"]]
    for axes, (key, heading) in zip(panels, _DRAWN.items(), strict=True):
        _panel(axes, variants, key, colours)
        entitle(axes, heading)
    panels[-1].set_xscale("log", base=2)
    panels[-1].set_xticks(values, [f"{value:,}" for value in values])
    panels[-1].minorticks_off()
    name_axes(panels[-1], x=_AXES[sweep["axis"]])
    legend_below(panels[0], last_first=True)
    parts = [
        f"{one['name']} {format_ms(one['points'][0]['tpot_ms']['p50'])} per token at {values[0]:,} and "
        f"{format_ms(one['points'][-1]['tpot_ms']['p50'])} at {one['points'][-1]['value']:,}"
        for one in variants
    ]
    return inline_svg(figure, name=f"sweep-{sweep['axis']}", alt=f"{sweep_title(sweep)}: {'; '.join(parts)}.")


def _panel(axes: Any, variants: Sequence[Mapping[str, Any]], key: str, colours: Mapping[str, str]) -> None:
    bare(axes, ticks=True)
    medians: list[float] = []
    tops: list[float] = []
    for one in reversed(variants):  # the baseline lies below
        name, points = str(one["name"]), one["points"]
        heights = [point[key]["p50"] for point in points]
        whiskers = [_whiskers(point[key]) for point in points]
        axes.errorbar(
            [point["value"] for point in points],
            heights,
            yerr=np.transpose(whiskers),
            marker="o",
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            color=colours[name],
            label=short(name),
        )
        medians += heights
        tops += [height + above for height, (_, above) in zip(heights, whiskers, strict=True)]
    if max(medians) > _LOGARITHMIC_FROM * min(medians):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda ms, _: f"{ms:,g}")
        name_axes(axes, y="milliseconds, logarithmic")
    else:
        axes.set_ylim(0, 1.1 * min(max(tops), _TALLEST * max(medians)))
        name_axes(axes, y="milliseconds")


def _whiskers(latency: Mapping[str, Any]) -> tuple[float, float]:
    """How far the 10th and the 90th percentile are from the median."""
    samples = latency.get("samples") or [latency["p50"]]
    low, high = np.percentile(samples, (10, 90))
    return max(0.0, latency["p50"] - float(low)), max(0.0, float(high) - latency["p50"])


def workloads_table(record: Mapping[str, Any]) -> Table:
    """Everything in one table: a row for each workload and model, and for each point of a curve."""
    rows = [
        (str(workload["name"]), str(one["name"]), *(_spread(one[key]) for key in ("ttft_ms", "tpot_ms")))
        for workload in record.get("workloads") or ()
        for one in workload["variants"]
    ]
    rows += [
        (
            f"{sweep['axis']} {point['value']:,}",
            str(one["name"]),
            *(_spread(point[key]) for key in ("ttft_ms", "tpot_ms")),
        )
        for sweep in record.get("sweeps") or ()
        for one in sweep["variants"]
        for point in one["points"]
    ]
    headers = ("Workload", "Model", f"Time to first token, {_SPREAD}", f"Time per output token, {_SPREAD}")
    return Table(headers, tuple(rows))
