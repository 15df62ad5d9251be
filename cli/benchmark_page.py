"""What ``benchmark`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import echo, echo_json, echo_table, warn

if TYPE_CHECKING:
    from nirvana_deploy.base.shown.html import Record
    from nirvana_deploy.measure.recipe import Traffic


def show_folder(result: dict[str, Any], out: Path, *, profiled: bool, as_json: bool) -> None:
    """Print the benchmark of an output folder; then raises ContenderError where a model failed."""
    from nirvana_deploy.measure.contest.timing import require_all_timed
    from nirvana_deploy.report.roofline.bounds import PHASES
    from nirvana_deploy.report.roofline.operators import SAYS, operator_table
    from nirvana_deploy.report.table import summary_table

    if as_json:
        echo_json(result)
        require_all_timed(result)
        return
    warn(result["watch"]["cautions"])
    table = summary_table(result)
    echo_table(table.headers, table.rows)
    _show_failed(result)
    if profiled:
        echo(SAYS)
        for phase in PHASES:
            times = operator_table(result, phase)
            echo_table(times.headers, times.rows)
    echo(f"Report: {out / 'report.html'}")
    require_all_timed(result)


def show_workloads(result: Mapping[str, Any], traffic: Traffic, where: str | None, *, as_json: bool) -> None:
    """Print the workloads and sweeps that were just timed; ``result`` may hold earlier ones.

    ``where`` says what holds them. Then raises ContenderError where a model failed in one of them.
    """
    from nirvana_deploy.measure.contest.timing import require_all_timed
    from nirvana_deploy.report.pages import workloads as page

    names = {Path(one.strip()).stem for name in traffic.workloads for one in name.split(",")}
    axes = {text.partition("=")[0].strip() for text in traffic.sweeps}
    timed = [one for one in result["workloads"] if one["name"] in names]
    swept = [one for one in result["sweeps"] if one["axis"] in axes]
    if as_json:
        echo_json(result)
        for one in (*timed, *swept):
            require_all_timed(one)
        return
    warn(result.get("cautions", ()))
    tables = [(page.title(one), page.explain(one), page.workload_table(one), 1, one) for one in timed]
    tables += [
        (page.sweep_title(one), page.explain_sweep(one), page.sweep_table(one), 2, one) for one in swept
    ]
    for title, says, table, texts, record in tables:
        warn([f"{title}: {caution}" for caution in page.cautions(record)])
        echo_table(table.headers, table.rows, title=title, texts=texts)
        echo(says)
    if where is not None:
        echo(where)
    for one in (*timed, *swept):
        require_all_timed(one)


def show_contest(record: Record, where: str | None, *, as_json: bool) -> None:
    """Print a contest, and ``where`` it is kept; then raises ContenderError where a contender failed."""
    from nirvana_deploy.measure.contest.timing import require_all_timed
    from nirvana_deploy.report.compare.contest_table import contest_table, rounds_line

    if as_json:
        echo_json(record)
    else:
        warn([*record["watch"]["cautions"], *record["cautions"]])
        table = contest_table(record)
        echo_table(table.headers, table.rows)
        _show_failed(record)
        echo(rounds_line(record))
        if where is not None:
            echo(where)
    require_all_timed(record)


def _show_failed(record: Mapping[str, Any]) -> None:
    from nirvana_deploy.report.compare.contest_table import failed_table

    if record.get("failed"):
        failed = failed_table(record)
        echo_table(failed.headers, failed.rows, texts=3)
