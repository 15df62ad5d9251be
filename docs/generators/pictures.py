"""``:::{picture} units``: figures drawn at build time, as inline SVG in the colours of the page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from nirvana_deploy.output.records import LayerWidth
from nirvana_deploy.report.drawing import COLOURS, bare, entitle, inline_svg, new_figure
from nirvana_deploy.report.pages.layers import kept_width_figure

from .records import recorded_points

PLAN = Path(__file__).with_name("smollm2-s0.4-paper.json")
"""Kept widths of a real plan, and the command that makes it."""
_QUERY_HEADS, _KV_HEADS, _NEURONS = 9, 3, 16
"""As in SmolLM2, whose 1,536 neurons are drawn as 16."""
_GROUP, _NEURON = 1, 10
"""Which ones are marked."""


def _units() -> str:
    """A KV group and a neuron in the seven matrices of a layer."""
    figure = new_figure(2.1, width_in=7.5)
    axes = figure.subplots()
    bare(axes)
    each = _QUERY_HEADS // _KV_HEADS
    query = range(_GROUP * each, (_GROUP + 1) * each)
    x = 0.0
    for name, bands, marked, colour, across in (
        ("Q", _QUERY_HEADS, query, "first", False),
        ("K", _KV_HEADS, [_GROUP], "first", False),
        ("V", _KV_HEADS, [_GROUP], "first", False),
        ("O", _QUERY_HEADS, query, "first", True),
        ("gate", _NEURONS, [_NEURON], "second", False),
        ("up", _NEURONS, [_NEURON], "second", False),
        ("down", _NEURONS, [_NEURON], "second", True),
    ):
        x = _matrix(axes, x, name, bands, frozenset(marked), COLOURS[colour], across=across) + 3
        x += 4 if name == "O" else 0
    axes.set_xlim(-1, x)
    axes.set_ylim(-3, 17)
    axes.set_aspect("equal")
    entitle(axes, "What goes together: one KV group (blue), one neuron (orange)")
    alt = (
        "The matrices of one layer. A KV group is the rows of one KV head in K and V, the rows of its three "
        "query heads in Q, and their columns in O. A neuron is a row of gate, a row of up, a column of down."
    )
    return inline_svg(figure, name="units", alt=alt)


def _matrix(
    axes: Any, x: float, name: str, bands: int, marked: frozenset[int], colour: str, *, across: bool
) -> float:
    """Draw one matrix of ``bands`` rows, or columns where ``across``; returns its right edge."""
    from matplotlib.patches import Rectangle

    width, height = (bands, 9) if across else (9, bands)
    for band in range(bands):
        corner = (x + band, 0) if across else (x, bands - 1 - band)
        size = (1, height) if across else (width, 1)
        face = colour if band in marked else COLOURS["rule"]
        axes.add_patch(Rectangle(corner, *size, facecolor=face, edgecolor=COLOURS["soft"], linewidth=0.4))
    axes.text(x + width / 2, -0.8, name, ha="center", va="top", fontsize=9, color=COLOURS["ink"])
    return x + width


def _kept() -> str:
    """What a global ranking keeps of each layer."""
    layers = json.loads(PLAN.read_text(encoding="utf-8"))["layers"]
    return kept_width_figure(
        [
            LayerWidth(
                layer=number,
                of_groups=one["of_groups"],
                kept_groups=tuple(one["kept_groups"]),
                of_neurons=one["of_neurons"],
                kept_neurons=one["kept_neurons"],
            )
            for number, one in enumerate(layers)
        ]
    )


def _kl() -> str:
    """Perplexity by KL, and the line on which both would be one thing."""
    points = recorded_points()
    figure = new_figure(4.0, width_in=7.5)
    axes = figure.subplots()
    bare(axes, ticks=True)
    most = 1.05 * max(one["kl"] for one in points)
    steps = [most * number / 60 for number in range(61)]
    axes.plot(steps, [math.exp(one) for one in steps], color=COLOURS["baseline"], label="e^KL")
    for name, colour, marker in ((None, "first", "o"), ("int8", "second", "s"), ("w4", "third", "^")):
        here = [one for one in points if one["scheme"] == name]
        axes.plot(
            [one["kl"] for one in here],
            [one["perplexity_ratio"] for one in here],
            marker,
            color=COLOURS[colour],
            label=name or "float",
        )
    axes.axvline(0.1, color=COLOURS["soft"], linewidth=0.8, linestyle="--")
    axes.set_xlabel("KL to dense, nats per token", color=COLOURS["soft"], fontsize=9)
    axes.set_ylabel("perplexity, times dense's", color=COLOURS["soft"], fontsize=9)
    axes.legend(frameon=False, fontsize=9, labelcolor=COLOURS["ink"])
    entitle(axes, "SmolLM2-135M at sparsities from 0 to 0.5; dashed: a KL of 0.1")
    alt = "Perplexity in times of dense's against KL for 18 models; they lie close to e to the KL."
    return inline_svg(figure, name="kl", alt=alt)


_PICTURES: dict[str, Callable[[], str]] = {"units": _units, "kept": _kept, "kl": _kl}


class Picture(SphinxDirective):
    """One picture; the content is its caption."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Draw it."""
        self.env.note_reread()
        (name,) = self.arguments
        if name not in _PICTURES:
            raise ExtensionError(f"There is no picture {name!r}; there are {', '.join(_PICTURES)}.")
        before = nodes.raw("", f'<figure class="picture">{_PICTURES[name]()}<figcaption>', format="html")
        caption = self.parse_content_to_nodes()
        return [before, *caption, nodes.raw("", "</figcaption></figure>", format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("picture", Picture)
    return {"parallel_read_safe": True}
