"""Figure of the curves: which layers are worth what, and what the plan kept of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nirvana_deploy.base.units import format_number
from nirvana_deploy.output.layout import CURVES_FILE
from nirvana_deploy.output.records import LayerWidth
from nirvana_deploy.prune.curves.curve import Curve, Curves, read_curves
from nirvana_deploy.report.drawing import (
    COLOURS,
    TEXT_POINTS,
    bare,
    entitle,
    inline_svg,
    layer_ticks,
    name_axes,
    new_figure,
)

_FFN_SHARE = 0.3
"""Share of an FFN's neurons whose loss is drawn."""
_TICKS = 8
_FEWEST = 6
"""Layers that a figure has room for at least: a single one is no wall."""
_FLOOR = 1e-6
"""Least KL that a logarithmic axis shows, nats."""


def curves_of(out: Path, layers: Sequence[LayerWidth]) -> Curves | None:
    """The curves of an output folder; None without, or where they are of another number of layers."""
    if not (out / CURVES_FILE).is_file():
        return None
    curves = read_curves(out / CURVES_FILE)
    return curves if len(curves.groups) == len(curves.neurons) == len(layers) else None


def curves_figure(curves: Curves, layers: Sequence[LayerWidth]) -> str:
    """Draw for each layer the predicted KL without one KV group, and without 30% of its neurons.

    Bars are logarithmic; the line above them is the share that the plan keeps. A site without FFN, or with a
    single group, has no bar.
    """
    panels = (
        (
            "Attention: predicted KL without one KV group",
            [_loss(curve, 1) for curve in curves.groups],
            [_share(len(layer.kept_groups), layer.of_groups) for layer in layers],
        ),
        (
            f"FFN: predicted KL without {_FFN_SHARE:.0%} of neurons",
            [
                _loss(curve, _FFN_SHARE * layer.of_neurons)
                for curve, layer in zip(curves.neurons, layers, strict=True)
            ],
            [_share(layer.kept_neurons, layer.of_neurons) for layer in layers],
        ),
    )
    figure = new_figure(4.0)
    drawn = figure.subplots(2, 1, sharex=True)
    for axes, (title, losses, kept) in zip(drawn, panels, strict=True):
        _panel(axes, title, losses, kept)
    ticks = layer_ticks(layers, _TICKS)
    drawn[-1].set_xticks(list(ticks), list(ticks.values()))
    name_axes(drawn[-1], x="layer, input on the left")
    said = ". ".join(f"{title}: {_extremes(losses, layers)}" for title, losses, _ in panels)
    return inline_svg(figure, name="curves", alt=f"What each layer is worth. {said}.")


def _loss(curve: Curve, removed: float) -> float | None:
    """KL with so many units gone; None where that many cannot go."""
    return curve.at(removed) if 0 < removed <= curve.removed[-1] else None


def _share(kept: int, of: int) -> float | None:
    return kept / of if of else None


def _panel(axes: Any, title: str, losses: Sequence[float | None], kept: Sequence[float | None]) -> None:
    bare(axes, ticks=True)
    places = [place for place, loss in enumerate(losses) if loss is not None]
    values = [max(loss, _FLOOR) for loss in losses if loss is not None]
    axes.set_yscale("log")
    axes.set_xlim(-0.6, max(len(losses), _FEWEST) - 0.4)
    if values:
        low = min(values) / 2
        heights = [value - low for value in values]
        axes.bar(places, heights, bottom=low, width=0.8, color=COLOURS["first"])
        axes.set_ylim(low, max(values) * 1.5)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda nats, _: f"{nats:g}")
    name_axes(axes, y="nats per token")
    _kept_line(axes.twinx(), kept)
    entitle(axes, title)


def _kept_line(axes: Any, kept: Sequence[float | None]) -> None:
    """The share kept, on an axis of its own on the right."""
    bare(axes, ticks=True)
    places = [place for place, share in enumerate(kept) if share is not None]
    shares = [share for share in kept if share is not None]
    axes.plot(places, shares, color=COLOURS["second"], linewidth=1.4, marker="o", markersize=4)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.set_ylabel("kept (orange)", color=COLOURS["soft"], fontsize=TEXT_POINTS)


def _extremes(losses: Sequence[float | None], layers: Sequence[LayerWidth]) -> str:
    """The layers of least and most loss, in words."""
    known = [(loss, layer.label) for loss, layer in zip(losses, layers, strict=True) if loss is not None]
    if not known:
        return "no layer can lose that much"
    (least, low), (most, high) = min(known), max(known)
    return (
        f"least in layer {low} ({format_number(least)} nats), most in layer {high} "
        f"({format_number(most)} nats)"
    )
