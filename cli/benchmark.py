"""``nirvana-deploy benchmark OUT``: measure an output folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nirvana_deploy.measure.recipe import Analysis, Workload
from nirvana_deploy.runtime.recipe import Place

from .arguments import OUTPUT
from .common import TerminalProgress, echo, echo_json, echo_table
from .options import json_option, recipe_options, taken


@click.command("benchmark")
@click.argument("out", type=OUTPUT)
@recipe_options(Workload)
@recipe_options(Analysis)
@recipe_options(Place, without=("threads",))
@json_option
def benchmark(out: Path, runtime: str | None, as_json: bool, **options: Any) -> None:
    """Measure OUT again, dense and pruned in turn, and rewrite its benchmark.json and report.

    \b
    Examples:
      nirvana-deploy benchmark smollm2-s0.4 --prompt-tokens 512 --repeats 21
      nirvana-deploy benchmark smollm2-s0.4 --precision 3% --wait-until-idle
      nirvana-deploy benchmark smollm2-s0.4 --profile
    """
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
