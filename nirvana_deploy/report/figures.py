"""Figures of the report: numbers in, inline SVG out; the same numbers give the same bytes.

Colours are CSS custom properties with a fallback, so one SVG fits light pages, dark pages and paper. Text
stays text: it can be selected, searched and read aloud.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from nirvana_deploy.base.units import format_bytes, format_ms, format_number, format_seconds, format_share
from nirvana_deploy.output.records import LayerWidth
from nirvana_deploy.report.pages.ntk import headers
from nirvana_deploy.report.table import format_times

# Okabe and Ito's palette, which stays apart under the common colour blindnesses; grey is the baseline.
# Keys are the CSS custom properties that the page may redefine, values the fallback.
COLOURS = {
    "ink": "#1d2733",
    "soft": "#5b6774",
    "rule": "#d5dbe1",
    "baseline": "#8a949e",
    "first": "#0072b2",
    "second": "#d55e00",
    "third": "#009e73",
    "fourth": "#cc79a7",
    "fifth": "#e69f00",
}
_SERIES = ("first", "second", "third", "fourth", "fifth")
_NARROW_IN = 4.4
WIDE_IN = 10.2
MAX_DOTS = 300
"""Samples drawn per variant; more would only make the page heavy."""


def inline_svg(figure: Figure, *, name: str, alt: str) -> str:
    """Render as an inline SVG element without date or URLs; ``name`` makes its ids unique."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a "$" in a name is a dollar
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML needs none
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r" font-family: [^;]*;", "", svg)  # the page's
    for colour, value in COLOURS.items():
        svg = svg.replace(f": {value}", f": var(--{colour}, {value})")
    label = html.escape(alt, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def new_figure(width_in: float, height_in: float) -> Figure:
    """A figure whose parts make room for each other."""
    return Figure(figsize=(width_in, height_in), layout="constrained")


def bare(axes: Any, *, ticks: bool = False) -> None:
    """Remove the frame; keep small soft ticks, or none."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=COLOURS["soft"])
    if not ticks:
        axes.set_xticks([])
        axes.set_yticks([])


def entitle(axes: Any, text: str) -> None:
    """Write a title above the left edge."""
    axes.set_title(text, loc="left", fontsize=10.5, color=COLOURS["ink"], pad=8)


def _label(axes: Any, x: float, y: float, text: str, **options: Any) -> None:
    """Write text at data coordinates, a few points clear of the mark."""
    offset = options.pop("offset", (6, 0))
    options = {"va": "center", "fontsize": 9.5, "color": COLOURS["ink"], **options}
    axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", annotation_clip=False, **options)


def _colours(names: Sequence[str], baseline: str | None) -> dict[str, str]:
    others = [name for name in names if name != baseline]
    series = {name: COLOURS[_SERIES[i % len(_SERIES)]] for i, name in enumerate(others)}
    return {name: series.get(name, COLOURS["baseline"]) for name in names}


def _rows(axes: Any, names: Sequence[str]) -> None:
    """Lay out one row per variant, the first on top, named on the left."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names, fontsize=9.5, color=COLOURS["ink"])


def kept_width_figure(layers: Sequence[LayerWidth]) -> str:
    """Draw KV groups and FFN neurons kept per layer, in two aligned panels."""
    of_groups = sum(layer.of_groups for layer in layers)
    kept_groups = sum(len(layer.kept_groups) for layer in layers)
    of_neurons = sum(layer.of_neurons for layer in layers)
    kept_neurons = sum(layer.kept_neurons for layer in layers)
    figure = new_figure(WIDE_IN, 3.9)
    groups, neurons = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.5))

    index = range(len(layers))
    for place, layer in enumerate(layers):
        every = range(layer.of_groups)
        colours = [COLOURS["first" if group in layer.kept_groups else "rule"] for group in every]
        groups.bar([place] * len(every), 0.86, bottom=[g - 0.43 for g in every], width=0.8, color=colours)
    neurons.bar(index, [layer.of_neurons for layer in layers], width=0.8, color=COLOURS["rule"])
    neurons.bar(index, [layer.kept_neurons for layer in layers], width=0.8, color=COLOURS["first"])

    for axes in (groups, neurons):
        bare(axes, ticks=True)
        axes.set_xlim(index[0] - 0.6, index[-1] + 0.6)
    most_groups = max(layer.of_groups for layer in layers)
    most_neurons = max(layer.of_neurons for layer in layers)
    groups.set_ylim(-0.5, most_groups - 0.5)
    groups.set_yticks(range(0, most_groups, max(1, most_groups // 4)))
    groups.set_ylabel("group", color=COLOURS["soft"], fontsize=9)
    neurons.set_yticks([0, most_neurons // 2, most_neurons])
    neurons.set_ylabel("neurons", color=COLOURS["soft"], fontsize=9)
    ticks = [place for place in index if layers[place].layer % max(1, len(layers) // 10) == 0]
    starts = [place for place in ticks if layers[place].site and not layers[place].layer]
    names = [layers[place].label if place in starts else str(layers[place].layer) for place in ticks]
    neurons.set_xticks(ticks, names)
    for axes in (groups, neurons):
        for start in starts[1:]:
            axes.axvline(start - 0.5, color=COLOURS["soft"], linewidth=0.8)
    neurons.set_xlabel("layer, input on the left", color=COLOURS["soft"], fontsize=9)
    entitle(groups, f"Attention: {kept_groups:,} of {of_groups:,} KV groups kept")
    entitle(neurons, f"FFN: {kept_neurons:,} of {of_neurons:,} neurons kept")
    narrowest = min((layer for layer in layers if layer.of_neurons), key=lambda layer: layer.kept_neurons)
    alt = (
        f"Kept width over {len(layers)} layers. Attention keeps {kept_groups:,} of {of_groups:,} KV groups, "
        f"the FFN {kept_neurons:,} of {of_neurons:,} neurons. "
        f"Narrowest FFN: layer {narrowest.label} with {narrowest.kept_neurons:,} neurons."
    )
    return inline_svg(figure, name="kept-width", alt=alt)


def _spread_rows(samples: Sequence[float]) -> list[tuple[float, float]]:
    """Choose up to ``MAX_DOTS`` samples evenly, each with a vertical offset that separates neighbours.

    The offsets follow the golden ratio, so they are even and reproducible.
    """
    step = max(1.0, len(samples) / MAX_DOTS)
    chosen = [samples[int(i * step)] for i in range(min(len(samples), MAX_DOTS))]
    return [(x, ((i * 0.618034) % 1 - 0.5) * 0.42) for i, x in enumerate(chosen)]


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
    figure = new_figure(_NARROW_IN, 0.95 + 0.72 * len(variants))
    axes = figure.subplots()
    bare(axes, ticks=True)
    limit = 1.3 * max(v[metric].get("p99") or v[metric]["p50"] for v in variants)
    axes.set_xlim(0, limit)
    axes.locator_params(axis="x", nbins=5)
    _rows(axes, names)
    colours = _colours(names, baseline)
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
        _label(axes, median, row - 0.3, f"{format_ms(median)}{tail}", offset=(0, 8), ha="center")
        if name in bound_ms:
            bound = bound_ms[name]
            axes.plot(
                [bound, bound], [row - 0.3, row + 0.3], color=COLOURS["ink"], linewidth=1, linestyle=":"
            )
            text = f"bound {format_number(bound)}"
            _label(
                axes, bound, row + 0.22, text, ha="right", offset=(-4, 0), fontsize=8.5, color=COLOURS["soft"]
            )
        beyond = sum(x > limit for x in samples)
        if beyond:
            _label(axes, limit, row + 0.22, f"{beyond} slower \N{RIGHTWARDS ARROW}", ha="right", fontsize=8.5)
    axes.set_xlabel("milliseconds", color=COLOURS["soft"], fontsize=9)
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
    colours = _colours(names, baseline)
    figure = new_figure(_NARROW_IN, len(measures) * (0.42 + 0.3 * len(variants)))
    panels = figure.subplots(len(measures), 1, squeeze=False)[:, 0]
    for axes, (key, title) in zip(panels, measures, strict=True):
        bare(axes)
        values = [v.get(key) or 0 for v in variants]
        axes.barh(range(len(values)), values, height=0.62, color=[colours[name] for name in names])
        axes.set_xlim(0, 1.22 * max(values))
        _rows(axes, names)
        for row, value in enumerate(values):
            _label(axes, value, row, format_bytes(value))
        entitle(axes, title)
    parts = [
        f"{title}: "
        + ", ".join(f"{v['name']} {format_bytes(v[key])}" for v in variants if v.get(key) is not None)
        for key, title in measures
    ]
    return inline_svg(figure, name="memory", alt="Memory. " + ". ".join(parts) + ".")


def quality_figure(
    variants: Sequence[Mapping[str, Any]], *, baseline: str | None, speedups: Mapping[str, float]
) -> str:
    """Draw decode speed-up, perplexity and KL to dense of each variant in one row.

    The KL has an error bar of one standard error if recorded. ``speedups`` maps variant names to decode
    speed-ups over the baseline, which itself stands at 1.
    """
    names = [str(v["name"]) for v in variants]
    colours = _colours(names, baseline)
    speeds = {**speedups, **({baseline: 1.0} if baseline in names else {})}
    columns: list[tuple[str, list[float | None], Callable[[float], str]]] = [
        ("Speed-up", [speeds.get(name) for name in names], format_times),
        ("Perplexity", [v["quality"].get("perplexity") for v in variants], format_number),
        ("KL to dense, nats", [v["quality"].get("kl_vs_dense") for v in variants], format_number),
    ]
    columns = [column for column in columns if any(value is not None for value in column[1])]
    errors = [v["quality"].get("kl_standard_error") for v in variants]
    figure = new_figure(_NARROW_IN, 0.6 + 0.9 * len(variants))
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for axes, (title, values, write) in zip(panels, columns, strict=True):
        bare(axes)
        _rows(axes, names)
        known = [value for value in values if value is not None]
        axes.set_xlim(0, (max(known) or 1) * 1.35)
        for row, (name, value) in enumerate(zip(names, values, strict=True)):
            axes.axhline(row, color=COLOURS["rule"], linewidth=0.8, zorder=0)
            if value is None:
                continue
            text = write(value)
            if title.startswith("KL") and errors[row]:
                axes.errorbar(value, row, xerr=errors[row], color=COLOURS["ink"], linewidth=1.2)
                text = f"{text} \N{PLUS-MINUS SIGN} {format_number(errors[row], digits=2)}"
            axes.scatter([value], [row], s=52, color=colours[name], zorder=3, clip_on=False)
            _label(axes, value, row, text, offset=(0, 12), ha="left" if value == 0 else "center")
        entitle(axes, title)
    parts = [
        f"{title}: "
        + ", ".join(f"{n} {write(x)}" for n, x in zip(names, values, strict=True) if x is not None)
        for title, values, write in columns
    ]
    return inline_svg(figure, name="quality", alt="Speed beside quality. " + ". ".join(parts) + ".")


def selection_figure(selection: Mapping[str, Any]) -> str:
    """Draw the KL of each candidate as a dot, one strip per saliency; mark the winner and the median.

    ``selection`` is what ``Selection.to_json`` of prune/choosing/select.py gives.
    """
    candidates, best = selection["candidates"], selection["candidates"][selection["winner"]]
    names = list(dict.fromkeys(str(candidate["saliency"]) for candidate in candidates))
    kls = [candidate["kl"] for candidate in candidates]
    margin = 0.08 * (max(kls) - min(kls)) or 0.05 * (max(kls) or 1)
    figure = new_figure(_NARROW_IN * 1.5, 1.1 + 0.72 * len(names))
    axes = figure.subplots()
    bare(axes, ticks=True)
    _rows(axes, names)
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
    text = f"{best['name']}: {format_number(best['kl'])}"
    _label(axes, best["kl"], row - 0.34, text, offset=(0, 4), ha="left", fontsize=9)
    median = selection["kl"]["median"]
    axes.axvline(median, color=COLOURS["soft"], linewidth=1, linestyle=":", zorder=0)
    axes.set_xlabel(
        f"KL to dense, nats, on {selection['heldout']['tokens']:,} held-out tokens (dotted: median)",
        color=COLOURS["soft"],
        fontsize=9,
    )
    entitle(axes, f"{len(candidates)} candidates; the axis does not start at zero")
    lead = "by more than chance" if selection["separable"] else "by no more than chance"
    alt = (
        f"KL to dense of {len(candidates)} candidates: {format_number(min(kls))} to "
        f"{format_number(max(kls))}, median {format_number(median)}. Least: {best['name']}"
        + (f", ahead of the next {lead}." if selection["runner_up"] is not None else ".")
    )
    return inline_svg(figure, name="selection", alt=alt)


def sensitivity_figure(layers: Mapping[str, float]) -> str:
    """Draw the KL of each layer alone in int8, in model order; label the worst three.

    ``layers``: KL in nats by the names of quantize/int8/sensitivity.py ("3", "encoder 3", "cross 3", "head").
    """
    names = sorted(layers, key=_layer_order)
    kls = [layers[name] for name in names]
    worst = sorted(range(len(names)), key=lambda at: -kls[at])[:3]
    figure = new_figure(WIDE_IN, 2.6)
    axes = figure.subplots()
    bare(axes)
    colours = [COLOURS["second" if at in worst else "first"] for at in range(len(names))]
    axes.bar(range(len(names)), kls, width=0.72, color=colours)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0, 1.15 * (max(kls) or 1))
    long = max(map(len, names)) > 4
    axes.set_xticks(range(len(names)), names, rotation=90 if long else 0, fontsize=8, color=COLOURS["soft"])
    for at in worst:
        _label(axes, at, kls[at], format_number(kls[at], digits=2), offset=(0, 7), ha="center", fontsize=9)
    entitle(axes, "KL when a layer alone runs in int8, nats")
    parts = [f"{names[at]} {format_number(kls[at], digits=2)}" for at in worst]
    return inline_svg(
        figure, name="sensitivity", alt=f"KL of each layer alone in int8. Worst: {', '.join(parts)}."
    )


def _layer_order(name: str) -> tuple[int, int]:
    """Encoder, decoder with its cross-attention, head."""
    site, _, number = name.rpartition(" ")
    if not number.isdigit():
        return (2, 0)
    return (0 if site == "encoder" else 1, 2 * int(number) + (site == "cross"))


def kernel_figure(record: Mapping[str, Any]) -> str:
    """Draw the change of the Adam kernel by each cut: measured, by removal alone, and the linear bound.

    ``record`` comes from ``NtkStudy.to_json`` of measure/ntk/study.py. The axis is logarithmic: a cut may
    change the kernel by many times its size.
    """
    cuts = record["cuts"]
    names = list(headers(record)[1:])
    colours = [COLOURS[_SERIES[i % len(_SERIES)]] for i in range(len(cuts))]
    marks = [cut["adam"][key] for cut in cuts for key in ("drift", "removed", "removed_bound")]
    figure = new_figure(_NARROW_IN * 1.5, 1.0 + 0.8 * len(cuts))
    axes = figure.subplots()
    bare(axes, ticks=True)
    _rows(axes, names)
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
        _label(axes, drift, row - 0.2, f"changed {format_share(drift)}", offset=(0, 6), ha="center")
    axes.set_xlabel(
        "share of the dense kernel, logarithmic",
        color=COLOURS["soft"],
        fontsize=9,
    )
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
    figure = new_figure(_NARROW_IN * 1.5, 0.5 + 0.29 * len(timed))
    axes = figure.subplots()
    bare(axes)
    _rows(axes, list(timed))
    axes.barh(range(len(timed)), seconds, height=0.62, color=COLOURS["first"])
    axes.set_xlim(0, 1.55 * max(seconds))
    for row, stage in enumerate(timed.values()):
        memory = stage.get("peak_rss_bytes")
        label = f"{format_seconds(stage['seconds'])}" + (f", peak {format_bytes(memory)}" if memory else "")
        _label(axes, stage["seconds"], row, label)
    parts = [f"{name} {format_seconds(stage['seconds'])}" for name, stage in timed.items()]
    return inline_svg(figure, name="stage-time", alt=f"Time of each stage: {', '.join(parts)}.")
