"""Each model beside what the machine allows: the roofline, as a picture and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from nirvana_deploy.base.units import format_bytes, format_ms, format_number, format_share
from nirvana_deploy.report.drawing import (
    COLOURS,
    bare,
    colours_of,
    entitle,
    inline_svg,
    label_points,
    legend_below,
    name_axes,
    new_figure,
)
from nirvana_deploy.report.page import PlacedFigure
from nirvana_deploy.report.table import ABSENT, baseline_of

HEADERS = (
    "Model",
    "Pass",
    "Moves",
    "Gop",
    "per byte",
    "At the memory's speed",
    "At the products' rate",
    "Measured",
    "Share of its bound",
)
PHASES = {"decode": "decode step", "prefill": "prefill"}
"""Key of the record: what it is called."""
_MARKS = {"decode": "o", "prefill": "s"}
_STYLES = ("--", ":", "-.")
"""Of the ceilings of products."""
_ROOM = 2.5
"""Times that the axes reach beyond points and ridge."""


def bounded_variants(benchmark: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The models whose bounds on this machine are recorded."""
    if not benchmark.get("ceilings"):
        return []
    return [variant for variant in benchmark.get("variants") or () if variant.get("roofline")]


def says(benchmark: Mapping[str, Any]) -> str:
    """What the machine reaches, and when that was measured."""
    found = benchmark["ceilings"]
    rates = ", ".join(
        f"{format_number(rate)} Gop/s of {kind}" for kind, rate in _rates(benchmark, found["gop_per_s"])
    )
    day = str(found["measured_at"]).partition("T")[0]
    return (
        f"This machine reaches, on {found['threads']} threads: {rates} products (measured on {day}), and "
        f"{format_number(found['memory_gb_per_s'])} GB/s read from memory (median between the rounds). "
        "A pass takes at least as long as its bytes or its products, whichever is longer. "
        "Gop: 10\N{SUPERSCRIPT NINE} multiplications and additions."
    )


def _rates(benchmark: Mapping[str, Any], rates: Mapping[str, float]) -> list[tuple[str, float]]:
    """The ceilings of what some model multiplies, the lowest first."""
    used = {
        kind
        for variant in bounded_variants(benchmark)
        for phase in PHASES
        for kind in variant["roofline"][phase]["operations"]
    }
    return sorted(((kind, rates[kind]) for kind in used if kind in rates), key=lambda item: item[1])


def rows(benchmark: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """A row for each model and pass; see HEADERS."""
    found = []
    for variant in bounded_variants(benchmark):
        for phase, called in PHASES.items():
            one = variant["roofline"][phase]
            measured = variant["tpot_ms" if phase == "decode" else "prefill_ms"]["p50"]
            share, products = one.get("share_of_bound"), one.get("products_ms")
            found.append(
                (
                    str(variant["name"]),
                    called,
                    format_bytes(one["moved_bytes"]),
                    format_number(sum(one["operations"].values()) / 1e9),
                    format_number(one["operations_per_byte"]),
                    format_ms(one["memory_ms"]),
                    ABSENT if products is None else format_ms(products),
                    format_ms(measured),
                    ABSENT if share is None else format_share(share),
                )
            )
    return tuple(found)


def roofline_figure(benchmark: Mapping[str, Any]) -> PlacedFigure | None:
    """Operations per byte against operations per second, both logarithmic, under the machine's ceilings."""
    variants = bounded_variants(benchmark)
    rates = _rates(benchmark, (benchmark.get("ceilings") or {}).get("gop_per_s") or {})
    if not variants or not rates:
        return None
    memory = benchmark["ceilings"]["memory_gb_per_s"]
    points = [
        (variant, phase, one["operations_per_byte"], one["gop_per_s"])
        for variant in variants
        for phase in PHASES
        for one in (variant["roofline"][phase],)
    ]
    figure = new_figure(4.2)
    axes = figure.subplots()
    bare(axes, ticks=True)
    axes.set_xscale("log")
    axes.set_yscale("log")
    top = rates[-1][1]
    left = min(x for *_, x, _ in points) / _ROOM
    right = max(*(x for *_, x, _ in points), top / memory) * _ROOM
    low = min(min(y for *_, y in points), memory * left) / _ROOM
    axes.set_xlim(left, right)
    axes.set_ylim(low, max(top, *(y for *_, y in points)) * _ROOM)
    axes.plot(
        [left, top / memory],
        [memory * left, top],
        color=COLOURS["soft"],
        linewidth=1.4,
        label=f"memory, {format_number(memory)} GB/s",
        zorder=0,
    )
    for (kind, rate), style in zip(rates, _STYLES * len(rates), strict=False):
        axes.plot(
            [rate / memory, right],
            [rate, rate],
            color=COLOURS["soft"],
            linewidth=1.4,
            linestyle=style,
            label=f"{kind} products, {format_number(rate)} Gop/s",
            zorder=0,
        )
    _mark(axes, points, colours_of([str(v["name"]) for v in variants], _baseline(benchmark)))
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    name_axes(axes, x="operations per byte, logarithmic", y="Gop/s, logarithmic")
    legend_below(axes, columns=2)
    entitle(axes, "Passes under this machine's ceilings")
    label_points(
        axes,
        [(x, y, str(variant["name"])) for variant, _, x, y in points],
        line=[(left, memory * left), (top / memory, top), (right, top)],
        bold=0,
    )
    parts = [f"{variant['name']} {PHASES[phase]} {_share(variant, phase)}" for variant, phase, *_ in points]
    alt = f"Operations per byte and per second of each pass. Shares of their bounds: {', '.join(parts)}."
    caption = (
        "Each pass under the lines that bound it: the slope is memory, the levels are products. "
        "Gop: 10\N{SUPERSCRIPT NINE} multiplications and additions."
    )
    return PlacedFigure(Markup(inline_svg(figure, name="roofline", alt=alt)), caption)


def _mark(
    axes: Any, points: Sequence[tuple[Mapping[str, Any], str, float, float]], colours: Mapping[str, str]
) -> None:
    """A mark for each point; the legend names the phases by their shapes."""
    for phase, mark in _MARKS.items():
        axes.plot([], [], mark, color=COLOURS["ink"], markersize=6, label=PHASES[phase])
    for variant, phase, x, y in points:
        axes.plot([x], [y], _MARKS[phase], color=colours[str(variant["name"])], markersize=7, zorder=3)


def _baseline(benchmark: Mapping[str, Any]) -> str | None:
    found = baseline_of(benchmark)
    return str(found["name"]) if found else None


def _share(variant: Mapping[str, Any], phase: str) -> str:
    share = variant["roofline"][phase].get("share_of_bound")
    return "of no known bound" if share is None else format_share(share)
