"""How figures of this room are drawn: numbers in, inline SVG out; the same numbers give the same bytes.

Colours are CSS custom properties with a fallback, so one SVG fits light pages, dark pages and paper. Text
stays text: it can be selected, searched and read aloud. All figures have one width, at which their text is
legible on a phone and in a column of a desktop page.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

from nirvana_deploy.base.terminal import harmless
from nirvana_deploy.output.records import LayerWidth
from nirvana_deploy.report.table import short

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
SERIES = ("first", "second", "third", "fourth", "fifth")
WIDTH_IN = 4.4
TITLE_POINTS, TEXT_POINTS = 11, 10
_AROUND = ((8, 0), (-8, 0), (6, 11), (-6, 11), (6, -11), (-6, -11), (0, 13), (0, -13), (6, 22), (6, -22))
"""Where the name of a point may stand, in points from it."""
_LEGEND_CHARACTERS = 48
"""In a line of a legend."""
_STEPS = 40
"""Of a piece of a line, when names keep off it."""


def inline_svg(figure: Figure, *, name: str, alt: str) -> str:
    """Render as an inline SVG element without date or URLs; ``name`` makes its ids unique."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a "$" in a name is a dollar
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), _any_script():
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML needs none
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r" font-family: [^;]*;", "", svg)  # the page's
    for colour, value in COLOURS.items():
        svg = svg.replace(f": {value}", f": var(--{colour}, {value})")
    label = html.escape(harmless(alt), quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


@contextmanager
def _any_script() -> Iterator[None]:
    """Lay out text in letters that the font of the metrics lacks: the page's font is another."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def new_figure(height_in: float, *, width_in: float = WIDTH_IN) -> Figure:
    """A figure whose parts make room for each other."""
    return Figure(figsize=(width_in, height_in), layout="constrained")


def bare(axes: Any, *, ticks: bool = False) -> None:
    """Remove the frame; keep small soft ticks, or none."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=TEXT_POINTS, labelcolor=COLOURS["soft"])
    if not ticks:
        axes.set_xticks([])
        axes.set_yticks([])


def entitle(axes: Any, text: str) -> None:
    """Write a title above the left edge."""
    axes.set_title(text, loc="left", fontsize=TITLE_POINTS, color=COLOURS["ink"], pad=8)


def name_axes(axes: Any, *, x: str | None = None, y: str | None = None) -> None:
    """Say what an axis counts, with its unit."""
    how = {"color": COLOURS["soft"], "fontsize": TEXT_POINTS}
    if x is not None:
        axes.set_xlabel(x, **how)
    if y is not None:
        axes.set_ylabel(y, **how)


def legend_columns(names: Sequence[str]) -> int:
    """How many columns of a legend the names leave room for."""
    return max(1, min(len(names), _LEGEND_CHARACTERS // (max(map(len, names)) + 4)))


def legend_below(axes: Any, *, columns: int | None = None, last_first: bool = False) -> None:
    """Name what ``axes`` shows below the figure, in as many columns as the names leave room for."""
    handles, names = axes.get_legend_handles_labels()
    if last_first:
        handles, names = handles[::-1], names[::-1]
    axes.figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=columns or legend_columns(names),
        fontsize=TEXT_POINTS,
        labelcolor=COLOURS["ink"],
        frameon=False,
        columnspacing=1.0,
        handletextpad=0.4,
    )


def label(axes: Any, x: float, y: float, text: str, **options: Any) -> None:
    """Write text at data coordinates, a few points clear of the mark."""
    offset = options.pop("offset", (6, 0))
    options = {"va": "center", "fontsize": TEXT_POINTS, "color": COLOURS["ink"], **options}
    axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", annotation_clip=False, **options)


def label_points(
    axes: Any,
    points: Sequence[tuple[float, float, str]],
    *,
    line: Sequence[tuple[float, float]],
    bold: int,
) -> None:
    """Name points (x, y, name) where there is room, the first ones first; the first ``bold`` in any case.

    A name stands on no point, name or axis, and not on ``line`` where it can. Those on the line are in ink,
    the others soft.
    """
    figure = axes.figure
    with _any_script():
        figure.draw_without_rendering()  # now the layout is known
    to_points = 72 / figure.dpi
    width = 72 * figure.get_figwidth()
    inner = axes.get_window_extent()
    left_edge, low_edge = inner.x0 * to_points, inner.y0 * to_points - TEXT_POINTS
    high_edge = inner.y1 * to_points + TEXT_POINTS / 2

    def place(x: float, y: float) -> Any:
        return axes.transData.transform((x, y)) * to_points

    places = [place(x, y) for x, y, _ in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    steps = np.linspace(0, 1, _STEPS)
    corners = [place(*corner) for corner in line]
    crossed = [a + (b - a) * step for a, b in pairwise(corners) for step in steps]
    thin = [(x - 1, y - 1, x + 1, y + 1) for x, y in crossed]
    for rank, ((x, y), (at_x, at_y, name)) in enumerate(zip(places, points, strict=True)):
        text = short(name)
        long = 0.62 * TEXT_POINTS * len(text)
        for avoided, (right, up) in product(([*taken, *thin], taken), _AROUND):
            left = x + right - (0 if right > 0 else long if right < 0 else long / 2)
            box = (left, y + up - 6, left + long, y + up + 6)
            inside = box[0] > left_edge and box[1] > low_edge and box[2] < width and box[3] < high_edge
            if inside and not any(_meet(box, other) for other in avoided):
                break
        else:
            if rank >= bold:
                continue
        taken.append(box)
        label(
            axes,
            at_x,
            at_y,
            text,
            offset=(right, up),
            ha="left" if right > 0 else "right" if right < 0 else "center",
            weight="bold" if rank < bold else "normal",
            color=COLOURS["ink" if (at_x, at_y) in line or rank < bold else "soft"],
        )


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def colours_of(names: Sequence[str], baseline: str | None) -> dict[str, str]:
    """A colour for each name; the baseline's is grey."""
    others = [name for name in names if name != baseline]
    series = {name: COLOURS[SERIES[i % len(SERIES)]] for i, name in enumerate(others)}
    return {name: series.get(name, COLOURS["baseline"]) for name in names}


def name_rows(axes: Any, names: Sequence[str]) -> None:
    """Lay out one row per name, the first on top, named on the left."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), map(short, names), fontsize=TEXT_POINTS, color=COLOURS["ink"])


def layer_ticks(layers: Sequence[LayerWidth], most: int) -> dict[int, str]:
    """Place -> text of about ``most`` layers, the first of each stack named."""
    step = max(1, -(-len(layers) // most))
    ticks = [place for place, layer in enumerate(layers) if layer.layer % step == 0]
    return {
        place: layers[place].label
        if layers[place].site and not layers[place].layer
        else str(layers[place].layer)
        for place in ticks
    }
