"""The page of a comparison, as HTML and as Markdown, and its table for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from nirvana_deploy.base.units import format_bytes, format_ms, format_number, format_share
from nirvana_deploy.report.compare.comparison import Comparison, Row
from nirvana_deploy.report.page import PlacedFigure, environment, markdown_environment
from nirvana_deploy.report.pages.plane import MEGABYTES, MILLISECONDS, Point, front_of, plane_figure
from nirvana_deploy.report.table import ABSENT, NO_DIFFERENCE, Table, format_times

GENERATOR = "nirvana-deploy report --compare"
"""What a page says of its origin, near its beginning."""
BRIEF = ("Folder", "Variant", "Size", "KL", "Perplexity", "Speed-up", "Verdict")
_LEVELS = {"ship": "ship", "care": "with care", "no": "do not ship", "open": "open", None: "baseline"}


def brief_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row for each model as a terminal has room for it; see BRIEF. Perplexity is on the worst text."""
    return [
        (
            one.folder,
            one.variant,
            _cell(one.weights_bytes, format_bytes),
            _cell(one.kl, format_number),
            _cell(max(one.perplexity_ratios.values(), default=None), format_times),
            _speed(one),
            _verdict(one),
        )
        for one in comparison.rows
    ]


def table(comparison: Comparison) -> Table:
    """A row for each model; the perplexity has a column for each text."""
    kinds = list(dict.fromkeys(kind for one in comparison.rows for kind in one.perplexity_ratios))
    several = len({one.model for one in comparison.rows}) > 1
    headers = (
        "Folder: variant",
        "Verdict",
        *(["Model"] if several else []),
        "Removed",
        "Scheme",
        "Size",
        "KL to dense",
        *(f"Perplexity, {kind}" for kind in kinds),
        "First token",
        "Per token",
        "Speed-up (from, to)",
    )
    return Table(headers, tuple(_row(one, kinds, several=several) for one in comparison.rows))


def _row(one: Row, kinds: list[str], *, several: bool) -> tuple[str, ...]:
    error = one.kl_standard_error
    noise = f" \N{PLUS-MINUS SIGN} {format_number(error, digits=2)}" if error else ""
    low, high = one.interval or (None, None)
    spread = f" ({format_times(low)} to {format_times(high)})" if low and high else ""
    return (
        one.name,
        _verdict(one),
        *([one.model] if several else []),
        _cell(one.sparsity, format_share),
        one.scheme or "float",
        _cell(one.weights_bytes, format_bytes),
        _cell(one.kl, format_number) + noise,
        *(_cell(one.perplexity_ratios.get(kind), format_times) for kind in kinds),
        _cell(one.ttft_ms, format_ms),
        _cell(one.tpot_ms, format_ms),
        _speed(one) + spread,
    )


def _speed(one: Row) -> str:
    return NO_DIFFERENCE if one.shows_difference is False else _cell(one.speedup, format_times)


def _verdict(one: Row) -> str:
    return "take" + (", with care" if one.level == "care" else "") if one.take else _LEVELS[one.level]


def _cell(value: float | None, write: Callable[[float], str]) -> str:
    return ABSENT if value is None else write(value)


def _figure(comparison: Comparison) -> PlacedFigure | None:
    """Quality against speed, or against size where the times do not compare; a colour for each folder."""
    by_time = comparison.alike.times
    points = []
    for one in comparison.rows:
        cost = one.tpot_ms if by_time else None if one.weights_bytes is None else one.weights_bytes / 1e6
        if one.kl is not None and cost is not None:
            points.append(
                Point(
                    one.name,
                    one.folder,
                    one.kl,
                    one.kl_standard_error,
                    cost,
                    recommended=one.take,
                    text=one.variant,
                )
            )
    unit = MILLISECONDS if by_time else MEGABYTES
    svg = plane_figure(points, front=front_of(points), unit=unit, name="compare")
    if svg is None:
        return None
    caption = (
        "A colour for each folder. The line joins the models that no other beats in both; bold is to take."
    )
    if not comparison.alike.quality:
        caption += " Their KL does not compare across folders: look at one colour at a time."
    return PlacedFigure(Markup(svg), caption)


def _context(comparison: Comparison) -> dict[str, Any]:
    return {"found": comparison, "table": table(comparison), "generator": GENERATOR}


def comparison_html(comparison: Comparison) -> str:
    """A page with everything inside; every value is escaped."""
    template = environment().get_template("compare.html.j2")
    return template.render(**_context(comparison), figure=_figure(comparison))


def comparison_markdown(comparison: Comparison) -> str:
    """The same as Markdown, without the figure; every value is escaped."""
    return markdown_environment().get_template("compare.md.j2").render(_context(comparison))
