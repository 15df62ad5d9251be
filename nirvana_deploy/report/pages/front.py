"""The page of a search: which point to take, the front, and every point in a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nirvana_deploy.output.variants import DENSE
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
from nirvana_deploy.report.page import environment
from nirvana_deploy.report.table import ABSENT, format_bytes, format_ms, format_number, format_times
from nirvana_deploy.search.front import Cost, Recommendation, front, quantization_alone
from nirvana_deploy.search.point import Found, said

SCHEMA = 1
BRIEF = (0, 1, 3, 4, 5, 7, 8)
"""The columns that fit a terminal."""
HEADERS = (
    "Point",
    "KL to dense",
    "Perplexity",
    "to dense's",
    "Decode",
    "Speed-up",
    "p10 to p90",
    "Weight file",
    "",
)
_LIMITS: dict[str, tuple[str, Callable[[float], str]]] = {
    "max_kl": ("KL to dense", format_number),
    "max_perplexity_ratio": ("perplexity", lambda limit: f"{format_times(limit)} dense's"),
    "target_tpot_ms": ("decode", format_ms),
    "min_speedup": ("decode speed-up", format_times),
    "max_weights_bytes": ("weight file", format_bytes),
}
_COLUMNS = (
    "name",
    "sparsity",
    "scheme",
    "kl",
    "kl_standard_error",
    "perplexity",
    "perplexity_ratio",
    "weights_bytes",
    "tpot_ms",
    "speedup",
    "on_front",
    "failed",
)
_TICKS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
"""KL, nats."""
_SERIES = ("baseline", "first", "second", "third", "fourth")


def search_record(
    model: str, points: Sequence[Found], advice: Recommendation, benchmark: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of search.json."""
    by_size = {one.name for one in front(points, "weights_bytes")}
    by_time = {one.name for one in front(points, "tpot_ms")}
    chosen = advice.point
    return {
        "schema": SCHEMA,
        "model": model,
        "target": advice.target.asked,
        "target_given": advice.given,
        "recommended": None if chosen is None else chosen.name,
        "verdict": verdict(points, advice),
        "next": [] if chosen is None else _next(chosen),
        "points": [
            {
                **asdict(one),
                "on_front": one.name in (by_time or by_size),
                "on_size_front": one.name in by_size,
            }
            for one in points
        ],
        "environment": None if benchmark is None else benchmark["environment"],
        "workload": None if benchmark is None else benchmark["workload"],
    }


def verdict(points: Sequence[Found], advice: Recommendation) -> str:
    """Which point to take, and why, in at most three sentences."""
    asked = " and ".join(_limit(name, limit) for name, limit in advice.target.asked.items())
    if not advice.given:
        asked = f"{asked}, taken since no budget was given"
    if advice.point is None:
        near = "" if advice.nearest is None else f" Nearest: {said(advice.nearest)}."
        return f"No point meets the budget ({asked}).{near}"
    chosen = advice.point
    best = "the fastest" if advice.target.on_quality else "the nearest to dense"
    words = [f"Take {said(chosen)}: {best} within the budget ({asked})."]
    if chosen.sparsity == 0 and any(one.sparsity for one in points):
        words.append(
            "No cut is better under this budget: "
            + ("quantization alone beats pruning." if chosen.scheme else "the dense model itself is.")
        )
    elif (alone := quantization_alone(points, chosen)) is not None:
        words.append(f"Quantization alone beats it, though: {said(alone)}.")
    return " ".join(words)


def _limit(name: str, limit: float) -> str:
    what, write = _LIMITS[name]
    return f"{what} at {'least' if name == 'min_speedup' else 'most'} {write(limit)}"


def _next(chosen: Found) -> list[str]:
    """What to type in the folder of the search: run it; and complete its folder, report included."""
    model = f"{chosen.folder}/{chosen.variant.folder}"
    commands = [f"nirvana-deploy generate {model} --prompt 'The capital of France is'"]
    if chosen.sparsity:
        recipe = f"{chosen.folder}/recipe.toml"
        commands.append(f"nirvana-deploy prune-export --recipe {recipe} --resume --out {chosen.folder}")
    return commands


def search_csv(record: Mapping[str, Any]) -> str:
    """Every point as a line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(record["points"])
    return text.getvalue()


def rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each point; see HEADERS."""

    def cell(value: float | None, write: Any) -> str:
        return ABSENT if value is None else str(write(value))

    found: list[tuple[str, ...]] = []
    for one in record["points"]:
        spread = None if one["name"] == DENSE else one["speedup_p10_p90"]
        note = "recommended" if one["name"] == record["recommended"] else ""
        if one["failed"]:
            note = f"failed: {one['failed']}"
        elif not note and not one["on_front"]:
            note = "dominated" if one["tpot_ms"] is not None else "not timed"
        error = one["kl_standard_error"]
        kl = cell(one["kl"], format_number)
        found.append(
            (
                one["name"],
                f"{kl} \N{PLUS-MINUS SIGN} {format_number(error, digits=2)}" if error else kl,
                cell(one["perplexity"], format_number),
                cell(one["perplexity_ratio"], format_times),
                cell(one["tpot_ms"], format_ms),
                cell(one["speedup"], format_times),
                f"{format_times(spread[0])} to {format_times(spread[1])}" if spread else ABSENT,
                cell(one["weights_bytes"], format_bytes),
                note,
            )
        )
    return found


def front_figure(record: Mapping[str, Any], cost: Cost) -> str | None:
    """KL against ``cost``: a colour for each precision, the front as a line; None where that is one point."""
    known = [one for one in record["points"] if one["kl"] is not None and one[cost] is not None]
    if len(known) < 2:
        return None
    flag = "on_front" if cost == "tpot_ms" else "on_size_front"
    scale, unit = (1.0, "decode, ms per token") if cost == "tpot_ms" else (1e6, "weight file, MB")
    figure = new_figure(3.6)
    axes = figure.subplots()
    bare(axes, ticks=True)
    schemes = list(dict.fromkeys(one["scheme"] for one in known))
    for scheme, series in zip(schemes, _SERIES, strict=False):
        here = [one for one in known if one["scheme"] == scheme]
        axes.errorbar(
            [one[cost] / scale for one in here],
            [one["kl"] for one in here],
            yerr=[one["kl_standard_error"] or 0.0 for one in here],
            fmt="o",
            markersize=6,
            linewidth=1,
            color=COLOURS[series],
            label=scheme or "float",
        )
    best = sorted((one for one in known if one[flag]), key=lambda one: one[cost])
    axes.plot(
        [one[cost] / scale for one in best],
        [one["kl"] for one in best],
        color=COLOURS["soft"],
        linewidth=1,
        zorder=0,
    )
    axes.set_yscale("symlog", linthresh=0.01)
    highest = 1.6 * max(one["kl"] for one in known)
    axes.set_ylim(-0.002, max(highest, 0.01))
    ticks = [tick for tick in _TICKS if tick <= max(highest, 0.01)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.08)
    name_axes(axes, x=unit, y="KL to dense, nats per token")
    if len(schemes) > 1:
        how = {"ncols": len(_SERIES), "columnspacing": 1.0, "handletextpad": 0.2, "frameon": False}
        figure.legend(loc="outside lower center", fontsize=TEXT_POINTS, labelcolor=COLOURS["ink"], **how)
    entitle(axes, "Nearer to dense is lower, cheaper is to the left")
    ranked = sorted(known, key=lambda one: (one["name"] != record["recommended"], not one[flag], one[cost]))
    label_points(
        axes,
        [(one[cost] / scale, one["kl"], one["name"]) for one in ranked],
        line=[(one[cost] / scale, one["kl"]) for one in best],
        bold=record["recommended"],
    )
    parts = [f"{one['name']} {one[cost] / scale:.4g} and KL {one['kl']:.3g}" for one in best]
    return inline_svg(
        figure, name=f"front-{cost.replace('_', '-')}", alt=f"{unit}. Front: {', '.join(parts)}."
    )


def search_page(record: Mapping[str, Any]) -> str:
    """search.html from search.json; every value is escaped for HTML."""
    costs: tuple[Cost, ...] = ("tpot_ms", "weights_bytes")
    figures = [svg for cost in costs if (svg := front_figure(record, cost)) is not None]
    return (
        environment()
        .get_template("search.html.j2")
        .render(record=record, headers=HEADERS, rows=rows(record), figures=figures)
    )
