"""What ``benchmark`` prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import echo, echo_json, echo_table, warn

if TYPE_CHECKING:
    from nirvana_deploy.base.shown.html import Record
    from nirvana_deploy.measure.recipe import Traffic


def show_folder(result: dict[str, Any], out: Path, *, profiled: bool, as_json: bool) -> None:
    """Print the benchmark of an output folder."""
    from nirvana_deploy.report.roofline.bounds import PHASES
    from nirvana_deploy.report.roofline.operators import SAYS, operator_table
    from nirvana_deploy.report.table import summary_table

    if as_json:
        echo_json(result)
        return
    warn(result["watch"]["cautions"])
    table = summary_table(result)
    echo_table(table.headers, table.rows)
    if profiled:
        echo(SAYS)
        for phase in PHASES:
            times = operator_table(result, phase)
            echo_table(times.headers, times.rows)
    echo(f"Report: {out / 'report.html'}")


def show_workloads(result: dict[str, Any], traffic: Traffic, out: Path, *, as_json: bool) -> None:
    """Print the workloads and sweeps that were just timed; ``result`` may hold earlier ones."""
    from nirvana_deploy.report.pages import workloads as page

    if as_json:
        echo_json(result)
        return
    names = {Path(one.strip()).stem for name in traffic.workloads for one in name.split(",")}
    axes = {text.partition("=")[0].strip() for text in traffic.sweeps}
    timed = [one for one in result["workloads"] if one["name"] in names]
    swept = [one for one in result["sweeps"] if one["axis"] in axes]
    tables = [(page.title(one), page.explain(one), page.workload_table(one), 1, one) for one in timed]
    tables += [
        (page.sweep_title(one), page.explain_sweep(one), page.sweep_table(one), 2, one) for one in swept
    ]
    for title, says, table, texts, record in tables:
        warn([f"{title}: {caution}" for caution in page.cautions(record)])
        echo_table(table.headers, table.rows, title=title, texts=texts)
        echo(says)
    echo(f"Report: {out / 'report.html'}")


def show_contest(record: Record, out: Path | None, *, as_json: bool) -> None:
    """Print a contest; then raises ContenderError where a contender failed."""
    from nirvana_deploy.measure.contest.timing import require_all_timed
    from nirvana_deploy.report.compare.contest_table import contest_table, failed_table, rounds_line

    if as_json:
        echo_json(record)
    else:
        warn([*record["watch"]["cautions"], *record["cautions"]])
        table = contest_table(record)
        echo_table(table.headers, table.rows)
        if record["failed"]:
            failed = failed_table(record)
            echo_table(failed.headers, failed.rows, texts=3)
        echo(rounds_line(record))
        if out is not None:
            echo(f"Record: {out}")
    require_all_timed(record)
