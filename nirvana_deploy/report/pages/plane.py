"""The picture that decides: quality against what a model costs, a point for each model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    name_axes,
    new_figure,
)
from nirvana_deploy.report.table import short

MILLISECONDS, MEGABYTES = "decode, ms per token", "weight file, MB"
KL, ACCURACY = "KL to dense, nats per token", "zero-shot accuracy, share of examples"
_MARKS = "os^Dv<>pX"
_TICKS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
"""KL, nats."""
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
    """What gives it its mark, if several ways are drawn."""


def front_of(points: Sequence[Point]) -> tuple[Point, ...]:
    """Those that no other beats in both KL and cost, the cheapest first."""
    best = [one for one in points if not any(_beats(other, one) for other in points)]
    return tuple(sorted(best, key=lambda one: one.cost))


def _beats(other: Point, one: Point) -> bool:
    nowhere_worse = other.quality <= one.quality and other.cost <= one.cost
    return nowhere_worse and (other.quality, other.cost) != (one.quality, one.cost)


def plane_figure(
    points: Sequence[Point],
    *,
    front: Sequence[Point],
    unit: str,
    name: str,
    axis: str = KL,
    ways: Iterable[str] = ("",),
) -> str | None:
    """Draw the points, a colour for each series, and the front as a line; None for fewer than two.

    ``unit`` names the axis of costs, which lie to the left where they are less; ``ways`` are all that have a
    mark, in this figure or in one beside it.
    """
    if len(points) < 2:
        return None
    figure = new_figure(3.6)
    axes = figure.subplots()
    bare(axes, ticks=True)
    kinds = list(dict.fromkeys((one.series, one.way) for one in points))
    colours = dict(zip(dict.fromkeys(series for series, _ in kinds), cycle(_SERIES), strict=False))
    marks = dict(zip(ways, cycle(_MARKS), strict=False))
    texts = [short(", ".join(filter(None, kind))) for kind in kinds]
    for (series, way), text in zip(kinds, texts, strict=True):
        here = [one for one in points if (one.series, one.way) == (series, way)]
        axes.errorbar(
            [one.cost for one in here],
            [one.quality for one in here],
            yerr=[one.standard_error or 0.0 for one in here],
            fmt=marks[way],
            markersize=6,
            linewidth=1,
            color=COLOURS[colours[series]],
            label=text,
        )
    line = [(one.cost, one.quality) for one in front]
    axes.plot([x for x, _ in line], [y for _, y in line], color=COLOURS["soft"], linewidth=1, zorder=0)
    if axis == KL:
        _from_zero(axes, max(1.6 * max(one.quality for one in points), 0.01))
    axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.08)
    name_axes(axes, x=unit, y=axis)
    if len(kinds) > 1:
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


def _from_zero(axes: Any, most: float) -> None:
    """A scale of KL that holds 0 and is logarithmic above."""
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(-0.002, most)
    ticks = [tick for tick in _TICKS if tick <= most]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
