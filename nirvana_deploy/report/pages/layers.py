"""Figures with a bar for each layer: what was kept of it, and what it loses in int8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.patches import PathPatch
from matplotlib.path import Path

from nirvana_deploy.base.units import format_number
from nirvana_deploy.output.records import LayerWidth
from nirvana_deploy.report.drawing import (
    COLOURS,
    TEXT_POINTS,
    bare,
    entitle,
    inline_svg,
    label,
    layer_ticks,
    name_axes,
    new_figure,
)

_FEWEST = 6
"""Layers that a figure has room for at least: a single one is no wall."""
_TICKS = 8
_Box = tuple[float, float, float, float]
"""Left, bottom, width and height."""


def kept_width_figure(layers: Sequence[LayerWidth]) -> str:
    """Draw KV groups and FFN neurons kept per layer, in two aligned panels."""
    of_groups = sum(layer.of_groups for layer in layers)
    kept_groups = sum(len(layer.kept_groups) for layer in layers)
    of_neurons = sum(layer.of_neurons for layer in layers)
    kept_neurons = sum(layer.kept_neurons for layer in layers)
    figure = new_figure(3.4)
    groups, neurons = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.5))

    places = list(enumerate(layers))
    cells = {
        kept: [
            (place - 0.4, group - 0.43, 0.8, 0.86)
            for place, layer in places
            for group in range(layer.of_groups)
            if (group in layer.kept_groups) == kept
        ]
        for kept in (True, False)
    }
    _boxes(groups, cells[False], "rule")
    _boxes(groups, cells[True], "first")
    _boxes(neurons, [(place - 0.4, 0, 0.8, layer.of_neurons) for place, layer in places], "rule")
    _boxes(neurons, [(place - 0.4, 0, 0.8, layer.kept_neurons) for place, layer in places], "first")

    for axes in (groups, neurons):
        bare(axes, ticks=True)
        axes.set_xlim(-0.6, max(len(layers), _FEWEST) - 0.4)
    most_groups = max(layer.of_groups for layer in layers)
    most_neurons = max(layer.of_neurons for layer in layers)
    groups.set_ylim(-0.5, most_groups - 0.5)
    groups.set_yticks(range(0, most_groups, max(1, -(-most_groups // 3))))
    neurons.set_ylim(0, max(most_neurons, 1))
    counts = (0, most_neurons // 2, most_neurons)
    neurons.set_yticks(counts, [f"{count:,}" for count in counts])
    name_axes(groups, y="KV group")
    name_axes(neurons, x="layer, input on the left", y="neurons")
    ticks = layer_ticks(layers, _TICKS)
    neurons.set_xticks(list(ticks), list(ticks.values()))
    for axes in (groups, neurons):
        for place, layer in places[1:]:
            if layer.site and not layer.layer:
                axes.axvline(place - 0.5, color=COLOURS["soft"], linewidth=0.8)
    entitle(groups, f"Attention: {kept_groups:,} of {of_groups:,} KV groups kept")
    entitle(neurons, f"FFN: {kept_neurons:,} of {of_neurons:,} neurons kept")
    alt = (
        f"Kept width over {len(layers)} layers. Attention keeps {kept_groups:,} of {of_groups:,} KV groups, "
        f"the FFN {kept_neurons:,} of {of_neurons:,} neurons."
    )
    if ffns := [layer for layer in layers if layer.of_neurons]:
        narrowest = min(ffns, key=lambda layer: layer.kept_neurons)
        alt += f" Narrowest FFN: layer {narrowest.label} with {narrowest.kept_neurons:,} neurons."
    return inline_svg(figure, name="kept-width", alt=alt)


def _boxes(axes: Any, boxes: Iterable[_Box], colour: str) -> None:
    """Draw boxes of one colour as one shape: hundreds of layers keep the page light."""
    paths = [
        Path([(x, y), (x + dx, y), (x + dx, y + dy), (x, y + dy), (x, y)], closed=True)
        for x, y, dx, dy in boxes
        if dy
    ]
    if paths:
        axes.add_patch(PathPatch(Path.make_compound_path(*paths), facecolor=COLOURS[colour], linewidth=0))


def sensitivity_figure(layers: Mapping[str, float]) -> str:
    """Draw the KL of each layer alone in int8, in model order; label the worst three.

    ``layers``: KL in nats by the names of quantize/int8/sensitivity.py ("3", "encoder 3", "cross 3", "head").
    """
    names = sorted(layers, key=_layer_order)
    kls = [layers[name] for name in names]
    worst = sorted(range(len(names)), key=lambda at: -kls[at])[:3]
    figure = new_figure(2.6)
    axes = figure.subplots()
    bare(axes, ticks=True)
    colours = [COLOURS["second" if at in worst else "first"] for at in range(len(names))]
    axes.bar(range(len(names)), kls, width=0.72, color=colours)
    axes.set_xlim(-0.6, max(len(names), _FEWEST) - 0.4)
    axes.set_ylim(0, 1.15 * (max(kls) or 1))
    axes.locator_params(axis="y", nbins=4)
    ticks = _some(names, worst)
    long = max(len(names[at]) for at in ticks) > 4
    axes.set_xticks(ticks, [names[at] for at in ticks], rotation=90 if long else 0)
    for at in worst:
        if not any(abs(at - other) < len(names) / 9 and kls[other] > kls[at] for other in worst):
            label(axes, at, kls[at], format_number(kls[at], digits=2), offset=(0, 7), ha="center")
    name_axes(axes, x="layer, input on the left", y="KL, nats per token")
    entitle(axes, "KL when a layer alone runs in int8")
    parts = [f"{names[at]} {format_number(kls[at], digits=2)}" for at in worst]
    return inline_svg(
        figure, name="sensitivity", alt=f"KL of each layer alone in int8. Worst: {', '.join(parts)}."
    )


def _some(names: Sequence[str], first: Sequence[int]) -> list[int]:
    """Places that have room for their names: ``first``, the head, then every so many."""
    apart = len(names) * TEXT_POINTS * (2.0 if max(map(len, names)) <= 4 else 1.3) / 250
    taken: list[int] = []
    for place in (*first, len(names) - 1, *range(len(names))):
        if all(abs(place - other) >= apart for other in taken):
            taken.append(place)
    return sorted(taken)


def _layer_order(name: str) -> tuple[int, int]:
    """Encoder, decoder with its cross-attention, head."""
    site, _, number = name.rpartition(" ")
    if not number.isdigit():
        return (2, 0)
    return (0 if site == "encoder" else 1, 2 * int(number) + (site == "cross"))
