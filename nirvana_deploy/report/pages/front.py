"""The page of a search: which point to take, the front, and every point in a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nirvana_deploy.output.variants import DENSE
from nirvana_deploy.report.page import environment
from nirvana_deploy.report.pages.plane import MEGABYTES, MILLISECONDS, Point, plane_figure
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
    scale, unit = (1.0, MILLISECONDS) if cost == "tpot_ms" else (1e6, MEGABYTES)
    flag = "on_front" if cost == "tpot_ms" else "on_size_front"
    known = [one for one in record["points"] if one["kl"] is not None and one[cost] is not None]
    points = {
        one["name"]: Point(
            one["name"],
            one["scheme"] or "float",
            one["kl"],
            one["kl_standard_error"],
            one[cost] / scale,
            recommended=one["name"] == record["recommended"],
        )
        for one in known
    }
    front = sorted((points[one["name"]] for one in known if one[flag]), key=lambda one: one.cost)
    return plane_figure(list(points.values()), front=front, unit=unit, name=f"front-{cost.replace('_', '-')}")


def search_page(record: Mapping[str, Any]) -> str:
    """search.html from search.json; every value is escaped for HTML."""
    costs: tuple[Cost, ...] = ("tpot_ms", "weights_bytes")
    figures = [svg for cost in costs if (svg := front_figure(record, cost)) is not None]
    return (
        environment()
        .get_template("search.html.j2")
        .render(record=record, headers=HEADERS, rows=rows(record), figures=figures)
    )
