"""Figures of the report about whole models: time, memory, choices and stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nirvana_deploy.base.units import format_bytes, format_ms, format_number, format_seconds, format_share
from nirvana_deploy.report.drawing import (
    COLOURS,
    SERIES,
    bare,
    colours_of,
    entitle,
    inline_svg,
    label,
    name_axes,
    name_rows,
    new_figure,
)
from nirvana_deploy.report.pages.ntk import headers
from nirvana_deploy.report.table import (
    short,
)

MAX_DOTS = 150
"""Samples drawn per variant; more would only make the page heavy."""


def _spread_rows(samples: Sequence[float]) -> list[tuple[float, float]]:
    """Choose up to ``MAX_DOTS`` samples evenly, each with a vertical offset that separates neighbours.

    The offsets follow the golden ratio, so they are even and reproducible.
    """
    step = max(1.0, len(samples) / MAX_DOTS)
    chosen = [samples[int(i * step)] for i in range(min(len(samples), MAX_DOTS))]
    return [(x, ((i * 0.618034) % 1 - 0.5) * 0.42) for i, x in enumerate(chosen)]


def _inward(share: float) -> str:
    """Alignment of a text at that share of an axis, so that it stays within."""
    return "left" if share < 0.3 else "right" if share > 0.7 else "center"


def latency_figure(
    variants: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    title: str,
    baseline: str | None,
    bound_ms: Mapping[str, float],
) -> str:
    """Draw samples of one latency as dots, medians as lines, and bounds if known.

    ``variants`` are entries of benchmark.json that have ``metric``; ``bound_ms`` maps a variant's name to
    the latency it would have at its bound. The axis starts at zero; samples beyond 1.3 times the largest
    p99 are counted at the edge instead of drawn.
    """
    names = [str(v["name"]) for v in variants]
    figure = new_figure(0.95 + 0.58 * len(variants))
    axes = figure.subplots()
    bare(axes, ticks=True)
    limit = 1.3 * max(v[metric].get("p99") or v[metric]["p50"] for v in variants)
    axes.set_xlim(0, limit)
    axes.locator_params(axis="x", nbins=5)
    name_rows(axes, names)
    axes.set_ylim(len(names) - 0.5, -0.75)  # the first row's label stands clear of the title
    colours = colours_of(names, baseline)
    for row, variant in enumerate(variants):
        name, samples = names[row], variant[metric].get("samples") or []
        median, p90 = variant[metric]["p50"], variant[metric].get("p90")
        dots = [dot for dot in _spread_rows(samples) if dot[0] <= limit]
        axes.axhline(row, color=COLOURS["rule"], linewidth=0.8, zorder=0)
        axes.scatter(
            [x for x, _ in dots],
            [row + y for _, y in dots],
            s=11 if len(samples) > 40 else 22,
            color=colours[name],
            alpha=0.28 if len(samples) > 40 else 0.6,
            linewidths=0,
        )
        axes.plot([median, median], [row - 0.3, row + 0.3], color=COLOURS["ink"], linewidth=2)
        tail = f", p90 {format_number(p90)}" if p90 is not None else ""
        side = _inward(median / limit)
        label(axes, median, row - 0.3, f"{format_ms(median)}{tail}", offset=(0, 8), ha=side)
        if name in bound_ms:
            bound = bound_ms[name]
            axes.plot(
                [bound, bound], [row - 0.3, row + 0.3], color=COLOURS["ink"], linewidth=1, linestyle=":"
            )
            text = f"bound {format_number(bound)}"
            how = {"color": COLOURS["soft"]}
            if bound > 0.3 * limit:
                label(axes, bound, row + 0.22, text, ha="right", offset=(-4, 0), **how)
            else:  # no room on the left
                label(axes, max(bound, median), row + 0.22, text, offset=(6, 0), **how)
        beyond = sum(x > limit for x in samples)
        if beyond:
            label(axes, limit, row + 0.22, f"{beyond} slower \N{RIGHTWARDS ARROW}", ha="right")
    name_axes(axes, x="milliseconds")
    entitle(axes, title)
    parts = [f"{v['name']} {format_ms(v[metric]['p50'])}" for v in variants]
    return inline_svg(figure, name=metric.replace("_", "-"), alt=f"{title}, median: {', '.join(parts)}.")


def memory_figure(variants: Sequence[Mapping[str, Any]], *, baseline: str | None) -> str:
    """Draw bars of weight file, peak memory and KV cache per token, each from zero."""
    measures = [
        (key, title)
        for key, title in (
            ("weights_bytes", "Weight file"),
            ("peak_rss_bytes", "Peak memory (RSS)"),
            ("peak_device_bytes", "Peak device memory"),
            ("kv_cache_bytes_per_token", "KV cache per token"),
        )
        if any(v.get(key) is not None for v in variants)
    ]
    names = [str(v["name"]) for v in variants]
    colours = colours_of(names, baseline)
    figure = new_figure(len(measures) * (0.4 + 0.22 * len(variants)))
    panels = figure.subplots(len(measures), 1, squeeze=False)[:, 0]
    for axes, (key, title) in zip(panels, measures, strict=True):
        bare(axes)
        values = [v.get(key) or 0 for v in variants]
        axes.barh(range(len(values)), values, height=0.62, color=[colours[name] for name in names])
        axes.set_xlim(0, 1.22 * max(values))
        name_rows(axes, names)
        for row, value in enumerate(values):
            label(axes, value, row, format_bytes(value))
        entitle(axes, title)
    parts = [
        f"{title}: "
        + ", ".join(f"{v['name']} {format_bytes(v[key])}" for v in variants if v.get(key) is not None)
        for key, title in measures
    ]
    return inline_svg(figure, name="memory", alt="Memory. " + ". ".join(parts) + ".")


def selection_figure(selection: Mapping[str, Any]) -> str:
    """Draw the KL of each candidate as a dot, one strip per saliency; mark the winner and the median.

    ``selection`` is what ``Selection.to_json`` of prune/choosing/select.py gives.
    """
    candidates, best = selection["candidates"], selection["candidates"][selection["winner"]]
    names = list(dict.fromkeys(str(candidate["saliency"]) for candidate in candidates))
    kls = [candidate["kl"] for candidate in candidates]
    margin = 0.08 * (max(kls) - min(kls)) or 0.05 * (max(kls) or 1)
    figure = new_figure(1.1 + 0.72 * len(names))
    axes = figure.subplots()
    bare(axes, ticks=True)
    name_rows(axes, names)
    axes.set_xlim(min(kls) - margin, max(kls) + margin)
    axes.locator_params(axis="x", nbins=5)
    for row, name in enumerate(names):
        axes.axhline(row, color=COLOURS["rule"], linewidth=0.8, zorder=0)
        others = [c["kl"] for c in candidates if c["saliency"] == name and c is not best]
        dots = _spread_rows(others)
        axes.scatter(
            [x for x, _ in dots],
            [row + y for _, y in dots],
            s=26,
            color=COLOURS["baseline"],
            alpha=0.75,
            linewidths=0,
        )
    row = names.index(best["saliency"])
    axes.scatter([best["kl"]], [row], s=64, color=COLOURS["second"], linewidths=0, zorder=3)
    text = f"{short(best['name'], 34)}: {format_number(best['kl'])}"
    label(axes, best["kl"], row - 0.34, text, offset=(0, 4), ha="left")
    median = selection["kl"]["median"]
    axes.axvline(median, color=COLOURS["soft"], linewidth=1, linestyle=":", zorder=0)
    tokens = f"{selection['heldout']['tokens']:,} held-out tokens"
    name_axes(axes, x=f"KL to dense, nats per token\n{tokens}; dotted: the median")
    entitle(axes, f"{len(candidates)} candidates; the axis does not start at zero")
    lead = "by more than chance" if selection["separable"] else "by no more than chance"
    alt = (
        f"KL to dense of {len(candidates)} candidates: {format_number(min(kls))} to "
        f"{format_number(max(kls))}, median {format_number(median)}. Least: {best['name']}"
        + (f", ahead of the next {lead}." if selection["runner_up"] is not None else ".")
    )
    return inline_svg(figure, name="selection", alt=alt)


def kernel_figure(record: Mapping[str, Any]) -> str:
    """Draw the change of the Adam kernel by each cut: measured, by removal alone, and the linear bound.

    ``record`` comes from ``NtkStudy.to_json`` of measure/ntk/study.py. The axis is logarithmic: a cut may
    change the kernel by many times its size.
    """
    cuts = record["cuts"]
    names = list(headers(record)[1:])
    colours = [COLOURS[SERIES[i % len(SERIES)]] for i in range(len(cuts))]
    marks = [cut["adam"][key] for cut in cuts for key in ("drift", "removed", "removed_bound")]
    figure = new_figure(1.0 + 0.8 * len(cuts))
    axes = figure.subplots()
    bare(axes, ticks=True)
    name_rows(axes, names)
    axes.set_xscale("log")
    floor = 1e-6  # what a figure can show; an empty cut has no logarithm
    least = max(min(marks), floor)
    axes.set_xlim(least / 2, max(*marks, floor) * 3)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    for row, (cut, colour) in enumerate(zip(cuts, colours, strict=True)):
        drift, removed, bound = (
            max(cut["adam"][key], floor) for key in ("drift", "removed", "removed_bound")
        )
        axes.axhline(row, color=COLOURS["rule"], linewidth=0.8, zorder=0)
        axes.plot([removed, bound], [row, row], color=COLOURS["baseline"], linewidth=5, alpha=0.6, zorder=1)
        axes.plot([removed] * 2, [row - 0.22, row + 0.22], color=COLOURS["ink"], linewidth=1.4)
        axes.plot([bound] * 2, [row - 0.22, row + 0.22], color=COLOURS["ink"], linewidth=1, linestyle=":")
        axes.scatter([drift], [row], s=60, color=colour, linewidths=0, zorder=3)
        label(axes, drift, row - 0.2, f"changed {format_share(drift)}", offset=(0, 6), ha="center")
    name_axes(axes, x="share of the dense kernel, logarithmic")
    entitle(axes, "Change of the tangent kernel")
    parts = [
        f"{name} {format_share(adam['drift'])}, by removal alone {format_share(adam['removed'])}"
        for name, adam in zip(names, (cut["adam"] for cut in cuts), strict=True)
    ]
    return inline_svg(figure, name="kernel", alt=f"Change of the tangent kernel: {'; '.join(parts)}.")


def stage_time_figure(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the time of each stage in order, with its peak RSS."""
    timed = {name: stage for name, stage in stages.items() if stage.get("seconds") is not None}
    seconds = [stage["seconds"] for stage in timed.values()]
    figure = new_figure(0.5 + 0.29 * len(timed))
    axes = figure.subplots()
    bare(axes)
    name_rows(axes, list(timed))
    axes.barh(range(len(timed)), seconds, height=0.62, color=COLOURS["first"])
    axes.set_xlim(0, 1.55 * max(seconds))
    for row, stage in enumerate(timed.values()):
        memory = stage.get("peak_rss_bytes")
        peak = f", peak {format_bytes(memory)}" if memory else ""
        label(axes, stage["seconds"], row, f"{format_seconds(stage['seconds'])}{peak}")
    entitle(axes, "Time of each stage of the job")
    parts = [f"{name} {format_seconds(stage['seconds'])}" for name, stage in timed.items()]
    return inline_svg(figure, name="stage-time", alt=f"Time of each stage: {', '.join(parts)}.")
