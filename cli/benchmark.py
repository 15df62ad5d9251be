"""``nirvana-deploy benchmark``: measure an output folder again, or time models of any kind in turn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.runtime.recipe import Place

from .arguments import CONTENDER
from .common import TerminalProgress, echo, echo_json, echo_table
from .options import json_option, recipe_options, taken

if TYPE_CHECKING:
    from nirvana_deploy.base.shown.html import Record


@click.command("benchmark")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=CONTENDER)
@recipe_options(Workload)
@recipe_options(Place, without=("threads",))
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With several contenders: write the result, raw samples included, into FILE.",
)
@click.option("--force", is_flag=True, help="Replace FILE.")
@json_option
def benchmark(
    paths: tuple[Path, ...],
    runtime: str | None,
    out: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure an output folder again, or time models of any kind against each other.

    One output folder: its models in turn, dense and pruned, and its benchmark.json and report are rewritten.

    Several paths, or one of another kind: each is a contender, timed against the first one in alternating
    rounds, in its own process. PATH is an output folder (all its models, or OUT:pruned-w4 for one,
    OUT:dense,pruned for some), an ONNX folder, a checkpoint folder, an engine or a GGUF file. Named twice, it
    is an A/A test. All must be of one model, whose vocabulary the prompts are made of. --runtime concerns
    those that it takes. Exit code 3 when a contender failed; the others keep their results.

    \b
    Examples:
      nirvana-deploy benchmark smollm2-s0.4 --prompt-tokens 512 --repeats 21
      nirvana-deploy benchmark smollm2-s0.4 --precision 3% --wait-until-idle
      nirvana-deploy benchmark smollm2-s0.4:dense smollm2-s0.4:pruned-w4 smollm2-q8_0.gguf --out race.json
    """
    from nirvana_deploy.pipeline.contest import benchmark_contenders, is_one_output_folder

    workload, progress = taken(Workload, options), TerminalProgress()
    if not is_one_output_folder(paths):
        record = benchmark_contenders(
            paths, workload, runtime=runtime, out=out, force=force, progress=progress
        )
        _show_contest(record, out, as_json=as_json)
        return
    if out is not None or force:
        raise click.UsageError("--out and --force go with several contenders: a folder keeps its own record.")
    from nirvana_deploy.pipeline.folder import benchmark_folder
    from nirvana_deploy.report.table import summary_table

    result = benchmark_folder(paths[0], workload, runtime=runtime, progress=progress)
    if as_json:
        echo_json(result)
        return
    for caution in result["watch"]["cautions"]:
        echo(f"Caution: {caution}")
    table = summary_table(result)
    echo_table(table.headers, table.rows)
    echo(f"Report: {paths[0] / 'report.html'}")


def _show_contest(record: Record, out: Path | None, *, as_json: bool) -> None:
    from nirvana_deploy.measure.contest.timing import require_all_timed
    from nirvana_deploy.report.compare.contest_table import contest_table, failed_table, rounds_line

    if as_json:
        echo_json(record)
    else:
        for caution in (*record["watch"]["cautions"], *record["cautions"]):
            echo(f"Caution: {caution}")
        table = contest_table(record)
        echo_table(table.headers, table.rows)
        if record["failed"]:
            failed = failed_table(record)
            echo_table(failed.headers, failed.rows, texts=3)
        echo(rounds_line(record))
        if out is not None:
            echo(f"Record: {out}")
    require_all_timed(record)
