"""Where the time of a pass goes: operators and layers of each model side by side, from its profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from nirvana_deploy.base.units import format_ms, format_number
from nirvana_deploy.report.drawing import (
    COLOURS,
    bare,
    entitle,
    inline_svg,
    label,
    legend_below,
    name_axes,
    name_rows,
    new_figure,
)
from nirvana_deploy.report.page import PlacedFigure
from nirvana_deploy.report.roofline.bounds import PHASES
from nirvana_deploy.report.table import ABSENT, Table

SAYS = (
    "Milliseconds of ONNX Runtime's profile (nodes in brackets): means over the fastest half of the passes. "
    "The profiler takes time of its own, so a profiled pass is longer than a timed one."
)
_SHOWN_SHARE = 0.02
"""Of a pass: operators that take less of every model are summed up."""
_KINDS = {
    "products": ("first", "products with weights"),
    "attention": ("second", "attention"),
    "other": ("fifth", "other operators"),
    "between": ("baseline", "between operators"),
    "outside": ("rule", "outside the session"),
}
"""Part of a bar: its colour, and what it is called."""


def profiled_variants(benchmark: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The models that were profiled."""
    return [variant for variant in benchmark.get("variants") or () if variant.get("profile")]


def operator_table(benchmark: Mapping[str, Any], phase: str) -> Table:
    """A row for each operator that counts, the dearest first, and what is no operator's; a column a model."""
    variants = profiled_variants(benchmark)
    passes = [variant["profile"][phase] for variant in variants]
    found: dict[str, list[Mapping[str, Any] | None]] = {}
    for column, one in enumerate(passes):
        for entry in one["operators"]:
            found.setdefault(entry["operator"], [None] * len(passes))[column] = entry
    shares = {
        name: max(entry["ms"] / one["pass_ms"] for entry, one in zip(cells, passes, strict=True) if entry)
        for name, cells in found.items()
    }
    shown = sorted((name for name in found if shares[name] >= _SHOWN_SHARE), key=lambda name: -shares[name])
    rest = [name for name in found if name not in shown]
    if len(rest) == 1:
        shown, rest = [*shown, *rest], []
    rows = [(name, *(_cell(entry) for entry in found[name])) for name in shown]
    if rest:
        summed = [[found[name][column] for name in rest] for column in range(len(passes))]
        rows.append((f"{len(rest)} other operators", *(_cell(*entries) for entries in summed)))
    for key, name in (("between_ms", "Between operators"), ("outside_ms", "Outside the session")):
        rows.append((name, *(format_number(one[key]) for one in passes)))
    rows.append((f"Whole {PHASES[phase]}, profiled", *(format_number(one["pass_ms"]) for one in passes)))
    timed = "tpot_ms" if phase == "decode" else "prefill_ms"
    rows.append((f"Whole {PHASES[phase]}, timed", *(format_number(one[timed]["p50"]) for one in variants)))
    return Table(_headers(f"{PHASES[phase].capitalize()}, ms", variants), tuple(rows))


def layer_table(benchmark: Mapping[str, Any]) -> Table:
    """A row for each layer, with the time of its operators in a decode step."""
    variants = profiled_variants(benchmark)
    by_layer = [{one["layer"]: one for one in v["profile"]["decode"]["layers"]} for v in variants]
    names = dict.fromkeys(name for layers in by_layer for name in layers)
    return Table(
        _headers("Layer, decode step, ms", variants),
        tuple((name, *(_cell(layers.get(name)) for layers in by_layer)) for name in names),
    )


def section(benchmark: Mapping[str, Any]) -> dict[str, Any] | None:
    """Context of the section; None where no model was profiled."""
    if not profiled_variants(benchmark):
        return None
    return {
        "says": SAYS,
        "tables": [operator_table(benchmark, phase) for phase in PHASES],
        "layers": layer_table(benchmark),
    }


def time_figure(benchmark: Mapping[str, Any]) -> PlacedFigure | None:
    """A bar for each model's decode step: products with weights, attention, the rest, and no operator's."""
    variants = profiled_variants(benchmark)
    if not variants:
        return None
    names = [str(variant["name"]) for variant in variants]
    figure = new_figure(1.6 + 0.34 * len(variants))
    axes = figure.subplots()
    bare(axes, ticks=True)
    name_rows(axes, names)
    parts = [_parts(variant["profile"]["decode"]) for variant in variants]
    ends = [0.0] * len(variants)
    for kind, (colour, called) in _KINDS.items():
        widths = [one[kind] for one in parts]
        axes.barh(range(len(names)), widths, left=ends, height=0.62, color=COLOURS[colour], label=called)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.set_xlim(0, 1.22 * max(ends))
    axes.locator_params(axis="x", nbins=5)
    for row, end in enumerate(ends):
        label(axes, end, row, format_ms(end))
    bounds = [_weights_ms(variant) for variant in variants]
    for row, bound in enumerate(bounds):
        if bound is not None:
            axes.plot([bound] * 2, [row - 0.4, row + 0.4], color=COLOURS["ink"], linewidth=1.2, linestyle=":")
    name_axes(axes, x="milliseconds, profiled")
    legend_below(axes, columns=2)
    entitle(axes, "Where a decode step goes")
    alt = "; ".join(
        f"{name} " + ", ".join(f"{_KINDS[kind][1]} {format_ms(ms)}" for kind, ms in one.items())
        for name, one in zip(names, parts, strict=True)
    )
    caption = "From ONNX Runtime's profile, whose own time is in it."
    if any(bound is not None for bound in bounds):
        caption += " Dotted: what the bytes of the step take at the memory's speed."
    svg = inline_svg(figure, name="time-of-a-step", alt=f"Time of a decode step: {alt}.")
    return PlacedFigure(Markup(svg), caption)


def _parts(one: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds by kind, which add up to the pass."""
    found = dict.fromkeys(_KINDS, 0.0)
    for entry in one["operators"]:
        found[entry["kind"]] += entry["ms"]
    found["between"], found["outside"] = max(0.0, one["between_ms"]), max(0.0, one["outside_ms"])
    return found


def _weights_ms(variant: Mapping[str, Any]) -> float | None:
    found = ((variant.get("roofline") or {}).get("decode") or {}).get("memory_ms")
    return None if found is None else float(found)


def _headers(first: str, variants: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return (first, *(str(variant["name"]) for variant in variants))


def _cell(*entries: Mapping[str, Any] | None) -> str:
    """Milliseconds of several entries, and their nodes."""
    there = [entry for entry in entries if entry is not None]
    if not there:
        return ABSENT
    ms, nodes = (sum(entry[key] for entry in there) for key in ("ms", "nodes"))
    return f"{format_number(ms)} ({nodes:,})"
