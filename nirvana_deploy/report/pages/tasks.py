"""The record of tasks as a table: a row per task and metric, a column per variant, the mean last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.base.units import MINUS
from nirvana_deploy.report.table import ABSENT

_ERROR = "_stderr,"


def explain(record: Mapping[str, Any]) -> str:
    """One sentence: what was run."""
    limit = record.get("limit")
    examples = f", the first {limit:,} examples of each" if limit else ""
    shots = ", 0-shot" if record.get("files") else ""
    return f"Tasks of lm-evaluation-harness{shots}{examples}, with standard errors"


def headers(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Column names: task, metric, then the variants."""
    return ("task", "metric", *record["variants"])


def rows(record: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Rows of the table. The metric that stands for a local task comes first and enters the mean."""
    variants, files = record["variants"], record.get("files") or {}
    keys = dict.fromkeys(
        (task, metric)
        for found in variants.values()
        for task in found
        for metric in sorted(found[task], key=lambda m: not m.startswith(f"{_main(files, task)},"))
        if _ERROR not in metric
    )
    return (
        *(
            (
                task,
                metric.removesuffix(",none"),
                *(_cell(found.get(task, {}), metric) for found in variants.values()),
            )
            for task, metric in keys
        ),
        *_mean_rows(record),
    )


def _main(files: Mapping[str, Any], task: str) -> str:
    return str(files.get(task, {}).get("metric"))


def _cell(metrics: Mapping[str, float], metric: str) -> str:
    return _number(metrics.get(metric), metrics.get(metric.replace(",", _ERROR, 1)))


def _number(value: float | None, error: float | None, *, sign: str = "") -> str:
    if value is None:
        return ABSENT
    text = f"{value:{sign}.3f}".replace("-", MINUS)
    return text if error is None else f"{text} ± {error:.3f}"


def _mean_rows(record: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The mean of several tasks, and its paired difference from the first variant's."""
    means, files = record.get("means"), record.get("files") or {}
    if not means:
        return ()
    names = dict.fromkeys(files[task]["metric"] for task in means["tasks"])
    label = f"mean of {len(means['tasks'])}"
    found = [means["variants"][name] for name in record["variants"]]
    difference = tuple(_number(v["difference"], v["difference_standard_error"], sign="+") for v in found)
    value = (label, " or ".join(names), *(_number(v["mean"], v["standard_error"]) for v in found))
    if len(found) < 2:
        return (value,)
    return (value, (label, f"minus {means['baseline']}, paired", *difference))
