"""The picture that decides: quality against what a model costs, a point for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from nirvana_deploy.report.drawing import (
    COLOURS,
    bare,
    entitle,
    inline_svg,
    label_points,
    legend_below,
    legend_columns,
    name_axes,
    new_figure,
)
from nirvana_deploy.report.table import short

MILLISECONDS, MEGABYTES = "decode, ms per token", "weight file, MB"
KL, ACCURACY = "KL to dense, nats per token", "zero-shot accuracy, share of examples"
_MARKS = "os^Dv<>pX"
_TICKS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
"""KL, nats."""
_HEIGHT_IN, _ROW_IN = 3.6, 0.19
"""Of a figure, and of a further row of its legend."""
Kind = tuple[str, str]
"""Series and way."""
_SERIES = ("baseline", "first", "second", "third", "fourth", "fifth")


@dataclass(frozen=True)
class Point:
    """One model."""

    name: str
    series: str
    """What gives it its colour."""
    quality: float
    """In the unit of its axis: KL, which is better where it is less, or accuracy."""
    standard_error: float | None
    cost: float
    """In the unit of the axis."""
    recommended: bool = False
    text: str = ""
    """What stands beside it [its name]."""
    way: str = ""
    """How it was cut, if in several ways."""

    @property
    def kind(self) -> Kind:
        """Its series and way."""
        return self.series, self.way


def front_of(points: Sequence[Point], axis: str = KL) -> tuple[Point, ...]:
    """Those that no other beats in both quality and cost, the cheapest first."""
    best = [one for one in points if not any(_beats(other, one, axis) for other in points)]
    return tuple(sorted(best, key=lambda one: one.cost))


def _beats(other: Point, one: Point, axis: str) -> bool:
    nearer = other.quality <= one.quality if axis == KL else other.quality >= one.quality
    return nearer and other.cost <= one.cost and (other.quality, other.cost) != (one.quality, one.cost)


def plane_figure(
    points: Sequence[Point],
    *,
    front: Sequence[Point],
    unit: str,
    name: str,
    axis: str = KL,
    kinds: Sequence[Kind] = (),
) -> str | None:
    """Draw the points, a colour for each series, and the front as a line; None for fewer than two.

    ``unit`` names the axis of costs, which lie to the left where they are less. With ``kinds``, all series
    and ways in this figure or in one beside it, each has a mark of its own, and colour is left to the front:
    what is dominated is grey.
    """
    if len(points) < 2:
        return None
    here = {one.kind: short(", ".join(filter(None, one.kind))) for one in points}
    styles = _styles(kinds or list(here), marked=bool(kinds))
    dominated = [one for one in points if kinds and one not in front]
    rows = -(-len(here) // legend_columns(list(here.values())))
    figure = new_figure(_HEIGHT_IN + _ROW_IN * max(0, rows - 1 if kinds else 0))
    axes = figure.subplots()
    bare(axes, ticks=True)
    for kind, text in here.items():
        shown = [one for one in points if one.kind == kind and one not in dominated]
        _draw(axes, shown, *styles[kind], text=text)
        _draw(axes, [one for one in dominated if one.kind == kind], "baseline", styles[kind][1])
    if dominated:
        axes.fill([], [], color=COLOURS["baseline"], label="dominated")
    line = [(one.cost, one.quality) for one in front]
    axes.plot([x for x, _ in line], [y for _, y in line], color=COLOURS["soft"], linewidth=1, zorder=0)
    if axis == KL:
        _from_zero(axes, max(1.6 * max(one.quality for one in points), 0.01), room=bool(kinds))
    axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.14 if kinds else 0.08)  # room for names
    name_axes(axes, x=unit, y=axis)
    if len(here) > 1 or dominated:
        legend_below(axes)
    entitle(axes, f"Nearer to dense is {'lower' if axis == KL else 'higher'}, cheaper is to the left")
    ranked = sorted(points, key=lambda one: (not one.recommended, one not in front, one.cost))
    label_points(
        axes,
        [(one.cost, one.quality, one.text or one.name) for one in ranked],
        line=line,
        bold=sum(one.recommended for one in points),
    )
    measure = "KL" if axis == KL else "accuracy"
    parts = [f"{one.name} {one.cost:.4g} and {measure} {one.quality:.3g}" for one in front]
    return inline_svg(figure, name=name, alt=f"{unit}. Front: {', '.join(parts)}.")


def _styles(kinds: Sequence[Kind], *, marked: bool) -> dict[Kind, tuple[str, str]]:
    """The colour of each kind, by its series, and its mark: ``marked``, one of its own, and no grey."""
    series = dict.fromkeys(series for series, _ in kinds)
    colours = dict(zip(series, cycle(_SERIES[1:] if marked else _SERIES), strict=False))
    marks = cycle(_MARKS if marked else _MARKS[:1])
    return {kind: (colours[kind[0]], mark) for kind, mark in zip(kinds, marks, strict=False)}


def _draw(axes: Any, points: Sequence[Point], colour: str, mark: str, text: str | None = None) -> None:
    """Draw points with bars; those without any give ``text`` its mark in the legend all the same."""
    axes.errorbar(
        [one.cost for one in points],
        [one.quality for one in points],
        yerr=[one.standard_error or 0.0 for one in points],
        fmt=mark,
        markersize=6,
        linewidth=1,
        color=COLOURS[colour],
        label=text,
    )


def _from_zero(axes: Any, most: float, *, room: bool) -> None:
    """A scale of KL that holds 0, with ``room`` for a name below it, and is logarithmic above."""
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(-0.006 if room else -0.002, most)
    ticks = [tick for tick in _TICKS if tick <= most]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
