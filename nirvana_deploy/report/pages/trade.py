"""The picture that decides: quality against speed, a point for each model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from nirvana_deploy.output.records import Records
from nirvana_deploy.report.pages.front import front_figure
from nirvana_deploy.report.table import median_of

CAPTION = (
    "Nearer to dense is lower, faster is to the left. The line joins the models that no other beats in both; "
    "bold is recommended. Bars: standard error over the windows of text."
)


def trade_figure(records: Records, recommended: str | None) -> Markup | None:
    """KL against milliseconds per token; None for fewer than two models with both."""
    variants = (records.benchmark or {}).get("variants") or ()
    points = [point for one in variants if (point := _point(one)) is not None]
    for one in points:
        one["on_front"] = not any(_beats(other, one) for other in points)
    svg = front_figure({"points": points, "recommended": recommended}, "tpot_ms")
    return None if svg is None else Markup(svg)


def _point(variant: Mapping[str, Any]) -> dict[str, Any] | None:
    quality, tpot_ms = variant.get("quality") or {}, median_of(variant, "tpot_ms")
    kl = quality.get("kl_vs_dense")
    if kl is None or tpot_ms is None:
        return None
    name = str(variant["name"])
    return {
        "name": name,
        "scheme": name.partition("-")[2] or None,
        "kl": kl,
        "kl_standard_error": quality.get("kl_standard_error"),
        "tpot_ms": tpot_ms,
    }


def _beats(other: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
    nowhere_worse = other["kl"] <= one["kl"] and other["tpot_ms"] <= one["tpot_ms"]
    return nowhere_worse and (other["kl"], other["tpot_ms"]) != (one["kl"], one["tpot_ms"])
