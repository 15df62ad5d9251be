"""``nirvana-deploy benchmark OUT``: measure an output folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nirvana_deploy.measure.recipe import Analysis, Traffic, Workload
from nirvana_deploy.runtime.recipe import Place

from .arguments import OUTPUT
from .common import TerminalProgress, echo, echo_json, echo_table
from .options import json_option, recipe_options, taken, typed


@click.command("benchmark")
@click.argument("out", type=OUTPUT)
@recipe_options(Traffic)
@recipe_options(Workload)
@recipe_options(Analysis)
@recipe_options(Place, without=("threads",))
@json_option
def benchmark(out: Path, runtime: str | None, as_json: bool, **options: Any) -> None:
    """Measure OUT again, dense and pruned in turn, and rewrite its benchmark.json and report.

    With --workload or --sweep, other requests are timed and kept in workloads.json; benchmark.json stays.

    \b
    Examples:
      nirvana-deploy benchmark smollm2-s0.4 --prompt-tokens 512 --repeats 21
      nirvana-deploy benchmark smollm2-s0.4 --precision 3% --wait-until-idle
      nirvana-deploy benchmark smollm2-s0.4 --workload chat --workload rag
      nirvana-deploy benchmark smollm2-s0.4 --sweep context=128,512,2048
      nirvana-deploy benchmark smollm2-s0.4 --profile
    """
    traffic = taken(Traffic, options)
    if traffic.workloads or traffic.sweeps:
        _require_meant(traffic, typed(options))
        _time_workloads(out, traffic, taken(Workload, options), runtime, as_json=as_json)
        return
    from nirvana_deploy.pipeline.folder import benchmark_folder
    from nirvana_deploy.report.roofline.bounds import PHASES
    from nirvana_deploy.report.roofline.operators import SAYS, operator_table
    from nirvana_deploy.report.table import summary_table

    workload, analysis = taken(Workload, options), taken(Analysis, options)
    result = benchmark_folder(out, workload, analysis, runtime=runtime, progress=TerminalProgress())
    if as_json:
        echo_json(result)
        return
    for caution in result["watch"]["cautions"]:
        echo(click.style(caution, fg="red"))
    table = summary_table(result)
    echo_table(table.headers, table.rows)
    if analysis.profile:
        echo(SAYS)
        for phase in PHASES:
            times = operator_table(result, phase)
            echo_table(times.headers, times.rows)
    echo(f"Report: {out / 'report.html'}")


_OF_ONE_REQUEST = ("prompt_tokens", "new_tokens", "batch_size", "repeats")


def _require_meant(traffic: Traffic, said: dict[str, Any]) -> None:
    """Raise a usage error for an option that what is timed has no use for."""
    unused = [] if traffic.sweeps else [name for name in _OF_ONE_REQUEST if name in said]
    for name in (*unused, *(["precision"] if "precision" in said else ())):
        flag = f"--{name.replace('_', '-')}"
        if name == "precision":
            raise click.UsageError(f"{flag} is about one request; with --workload or --sweep, leave it out.")
        raise click.UsageError(f"{flag} says what the file of a workload says; leave it out.")


def _time_workloads(
    out: Path, traffic: Traffic, workload: Workload, runtime: str | None, *, as_json: bool
) -> None:
    from nirvana_deploy.pipeline.folder import benchmark_workloads
    from nirvana_deploy.report.pages import workloads as page

    result = benchmark_workloads(out, traffic, workload, runtime=runtime, progress=TerminalProgress())
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
        for caution in page.cautions(record):
            echo(click.style(f"{title}: {caution}", fg="red"))
        echo_table(table.headers, table.rows, title=title, texts=texts)
        echo(says)
    echo(f"Report: {out / 'report.html'}")
