"""Quality against speed of the models of one folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from nirvana_deploy.output import stage
from nirvana_deploy.output.records import Records
from nirvana_deploy.output.results import QualityMeasured
from nirvana_deploy.report.pages.plane import MILLISECONDS, Point, front_of, plane_figure
from nirvana_deploy.report.table import median_of

_CAPTION = (
    "The line joins the models that no other beats in both; bold is recommended. Bars: standard error over "
    "the windows of text."
)


def caption(records: Records) -> str:
    """What stands below the figure."""
    record = records.result(stage.QUALITY, QualityMeasured)
    several = record is not None and len(record.calibrated) > 1
    return _CAPTION if several else f"{_CAPTION} One text says little about other texts and tasks."


def trade_figure(records: Records, recommended: str | None) -> Markup | None:
    """KL against milliseconds per token; None for fewer than two models with both."""
    variants = (records.benchmark or {}).get("variants") or ()
    points = [point for one in variants if (point := _point(one, recommended)) is not None]
    svg = plane_figure(points, front=front_of(points), unit=MILLISECONDS, name="front-tpot-ms")
    return None if svg is None else Markup(svg)


def _point(variant: Mapping[str, Any], recommended: str | None) -> Point | None:
    quality, tpot_ms = variant.get("quality") or {}, median_of(variant, "tpot_ms")
    kl = quality.get("kl_vs_dense")
    if kl is None or tpot_ms is None:
        return None
    name = str(variant["name"])
    scheme = name.partition("-")[2] or "float"
    return Point(name, scheme, kl, quality.get("kl_standard_error"), tpot_ms, recommended=name == recommended)
