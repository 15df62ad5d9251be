"""The picture that decides: KL to dense against what a model costs, a point for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from nirvana_deploy.report.drawing import (
    COLOURS,
    TEXT_POINTS,
    bare,
    entitle,
    inline_svg,
    label_points,
    name_axes,
    new_figure,
)
from nirvana_deploy.report.table import short

MILLISECONDS, MEGABYTES = "decode, ms per token", "weight file, MB"
_TICKS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
"""KL, nats."""
_LEGEND_CHARACTERS = 48
"""Of all the names in one line below the figure."""
_SERIES = ("baseline", "first", "second", "third", "fourth", "fifth")


@dataclass(frozen=True)
class Point:
    """One model."""

    name: str
    series: str
    """What gives it its colour."""
    kl: float
    """To the dense model, nats per token."""
    kl_standard_error: float | None
    cost: float
    """In the unit of the axis."""
    recommended: bool = False
    text: str = ""
    """What stands beside it [its name]."""


def front_of(points: Sequence[Point]) -> tuple[Point, ...]:
    """Those that no other beats in both, the cheapest first."""
    best = [one for one in points if not any(_beats(other, one) for other in points)]
    return tuple(sorted(best, key=lambda one: one.cost))


def _beats(other: Point, one: Point) -> bool:
    nowhere_worse = other.kl <= one.kl and other.cost <= one.cost
    return nowhere_worse and (other.kl, other.cost) != (one.kl, one.cost)


def plane_figure(points: Sequence[Point], *, front: Sequence[Point], unit: str, name: str) -> str | None:
    """Draw the points, a colour for each series, and the front as a line; None for fewer than two.

    ``unit`` names the axis of costs, which lie to the left where they are less.
    """
    if len(points) < 2:
        return None
    figure = new_figure(3.6)
    axes = figure.subplots()
    bare(axes, ticks=True)
    series = list(dict.fromkeys(one.series for one in points))
    for this, colour in zip(series, cycle(_SERIES), strict=False):
        here = [one for one in points if one.series == this]
        axes.errorbar(
            [one.cost for one in here],
            [one.kl for one in here],
            yerr=[one.kl_standard_error or 0.0 for one in here],
            fmt="o",
            markersize=6,
            linewidth=1,
            color=COLOURS[colour],
            label=short(this),
        )
    line = [(one.cost, one.kl) for one in front]
    axes.plot([x for x, _ in line], [kl for _, kl in line], color=COLOURS["soft"], linewidth=1, zorder=0)
    axes.set_yscale("symlog", linthresh=0.01)
    highest = max(1.6 * max(one.kl for one in points), 0.01)
    axes.set_ylim(-0.002, highest)
    ticks = [tick for tick in _TICKS if tick <= highest]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.08)
    name_axes(axes, x=unit, y="KL to dense, nats per token")
    if len(series) > 1:
        columns = max(1, min(len(series), _LEGEND_CHARACTERS // (max(map(len, map(short, series))) + 4)))
        figure.legend(
            loc="outside lower center",
            ncols=columns,
            fontsize=TEXT_POINTS,
            labelcolor=COLOURS["ink"],
            frameon=False,
            columnspacing=1.0,
            handletextpad=0.2,
        )
    entitle(axes, "Nearer to dense is lower, cheaper is to the left")
    ranked = sorted(points, key=lambda one: (not one.recommended, one not in front, one.cost))
    label_points(
        axes,
        [(one.cost, one.kl, one.text or one.name) for one in ranked],
        line=line,
        bold=sum(one.recommended for one in points),
    )
    parts = [f"{one.name} {one.cost:.4g} and KL {one.kl:.3g}" for one in front]
    return inline_svg(figure, name=name, alt=f"{unit}. Front: {', '.join(parts)}.")
