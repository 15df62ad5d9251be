"""The page of a search: which point to take, the front, and every point in a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

from nirvana_deploy.base.units import format_bytes, format_ms, format_number
from nirvana_deploy.output.variants import DENSE
from nirvana_deploy.report.page import environment
from nirvana_deploy.report.pages.plane import (
    ACCURACY,
    KL,
    MEGABYTES,
    MILLISECONDS,
    Point,
    front_of,
    plane_figure,
)
from nirvana_deploy.report.table import ABSENT, format_times
from nirvana_deploy.search.front import Cost, Recommendation, front, quantization_alone
from nirvana_deploy.search.point import Found, said
from nirvana_deploy.search.record import SCHEMA, PointRecord, SearchRecord

HEADERS = (
    "Point",
    "KL to dense",
    "Perplexity",
    "to dense's",
    "Zero-shot",
    "Decode",
    "Speed-up",
    "from, to",
    "Weight file",
    "",
)
BRIEF = ("Point", "KL to dense", "to dense's", "Zero-shot", "Decode", "Speed-up", "Weight file", "")
"""The columns that fit a terminal."""
BRIEF_NAMES = {"to dense's": "Perplexity", "": "Note"}
"""What some of them are called there, where none stands beside them."""
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
    "way",
    "kl",
    "kl_standard_error",
    "perplexity",
    "perplexity_ratio",
    "accuracy",
    "accuracy_standard_error",
    "weights_bytes",
    "tpot_ms",
    "speedup",
    "on_front",
    "failed",
    "unverified",
)
Quality = Literal["kl", "accuracy"]
_ERRORS: dict[Quality, str] = {"kl": "kl_standard_error", "accuracy": "accuracy_standard_error"}


def search_record(
    model: str,
    points: Sequence[Found],
    advice: Recommendation,
    benchmark: Mapping[str, Any] | None,
    *,
    commands: Sequence[str],
) -> dict[str, Any]:
    """The content of search.json; ``commands`` are typed in its folder."""
    by_size = {one.name for one in front(points, "weights_bytes")}
    by_time = {one.name for one in front(points, "tpot_ms")}
    chosen = advice.point
    record = SearchRecord(
        schema=SCHEMA,
        model=model,
        target=advice.target.asked,
        target_given=advice.given,
        recommended=None if chosen is None else chosen.name,
        verdict=verdict(points, advice),
        next=list(commands),
        next_typed_in="the folder of this file",
        ways={one.way: one.options for one in points if one.way},
        points=[
            PointRecord(
                **vars(one),
                on_front=one.name in (by_time or by_size),
                on_size_front=one.name in by_size,
            )
            for one in points
        ],
        environment=None if benchmark is None else benchmark["environment"],
        workload=None if benchmark is None else benchmark["workload"],
    )
    return asdict(record)


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
    if chosen.unverified is not None:
        words.append(f"It failed its verification, though, and no other point is within: {chosen.unverified}")
    elif chosen.sparsity == 0 and any(one.sparsity for one in points):
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


def search_csv(record: Mapping[str, Any]) -> str:
    """Every point as a line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(record["points"])
    return text.getvalue()


def columns(record: Mapping[str, Any], wanted: Sequence[str] = HEADERS) -> list[str]:
    """The headers of the ``wanted`` columns that say something."""
    asked = any(one["accuracy"] is not None for one in record["points"])
    return [header for header in wanted if header != "Zero-shot" or asked]


def rows(record: Mapping[str, Any], wanted: Sequence[str] = HEADERS) -> list[list[str]]:
    """A row for each point, a cell for each of :func:`columns`."""
    headers = columns(record, wanted)
    return [
        [cells[header] for header in headers] for cells in (_row(record, one) for one in record["points"])
    ]


def _row(record: Mapping[str, Any], one: Mapping[str, Any]) -> dict[str, str]:
    """The cells of a point, by header."""

    def cell(value: float | None, write: Any) -> str:
        return ABSENT if value is None else str(write(value))

    def spread(value: float | None, error: float | None, digits: int = 3) -> str:
        words = cell(value, partial(format_number, digits=digits))
        return f"{words} \N{PLUS-MINUS SIGN} {format_number(error, digits=2)}" if error else words

    low_high = None if one["name"] == DENSE else one["speedup_interval"]
    note = "recommended" if one["name"] == record["recommended"] else ""
    if one["failed"]:
        note = f"failed: {one['failed']}"
    elif one["unverified"]:
        note = f"{note or 'not verified'}: {one['unverified']}"
    elif not note and not one["on_front"]:
        note = "dominated" if one["tpot_ms"] is not None else "not timed"
    return {
        "Point": one["name"],
        "KL to dense": spread(one["kl"], one["kl_standard_error"]),
        "Perplexity": cell(one["perplexity"], format_number),
        "to dense's": cell(one["perplexity_ratio"], format_times),
        "Zero-shot": spread(one["accuracy"], one["accuracy_standard_error"]),
        "Decode": cell(one["tpot_ms"], format_ms),
        "Speed-up": cell(one["speedup"], format_times),
        "from, to": f"{format_times(low_high[0])} to {format_times(low_high[1])}" if low_high else ABSENT,
        "Weight file": cell(one["weights_bytes"], format_bytes),
        "": note,
    }


def front_figure(record: Mapping[str, Any], cost: Cost, quality: Quality = "kl") -> str | None:
    """Quality against ``cost``: a mark for each precision and way to cut, the front in colour and as a line.

    None where fewer than two points are known.
    """
    scale, unit = (1.0, MILLISECONDS) if cost == "tpot_ms" else (1e6, MEGABYTES)
    flag = "on_front" if cost == "tpot_ms" else "on_size_front"
    known = [one for one in record["points"] if one[quality] is not None and one[cost] is not None]
    points = {
        one["name"]: Point(
            one["name"],
            one["scheme"] or "float",
            one[quality],
            one[_ERRORS[quality]],
            one[cost] / scale,
            recommended=one["name"] == record["recommended"],
            way=one["way"],
        )
        for one in known
    }
    name = "-".join(("front", *(["accuracy"] if quality == "accuracy" else []), cost.replace("_", "-")))
    if quality == "kl":
        axis, best = KL, sorted((points[one["name"]] for one in known if one[flag]), key=lambda one: one.cost)
    else:
        axis, best = ACCURACY, list(front_of(list(points.values()), ACCURACY))
    kinds = list(dict.fromkeys((one["scheme"] or "float", one["way"]) for one in record["points"]))
    return plane_figure(list(points.values()), front=best, axis=axis, unit=unit, name=name, kinds=kinds)


def search_page(record: Mapping[str, Any]) -> str:
    """search.html from search.json; every value is escaped for HTML."""
    wanted: tuple[tuple[Cost, Quality], ...] = (
        ("tpot_ms", "kl"),
        ("weights_bytes", "kl"),
        ("tpot_ms", "accuracy"),
    )
    figures = [svg for axes in wanted if (svg := front_figure(record, *axes)) is not None]
    return (
        environment()
        .get_template("search.html.j2")
        .render(record=record, headers=columns(record), rows=rows(record), figures=figures)
    )
