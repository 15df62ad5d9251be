"""``nirvana-deploy benchmark OUT``: measure an output folder again."""

from __future__ import annotations

from pathlib import Path

import click

from .common import TerminalProgress, echo_json, echo_table, json_option, runtime_option, threads_option


@click.command("benchmark")
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Prompt length."
)
@click.option(
    "--new-tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Tokens decoded."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Prompts at a time."
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=11, show_default=True, help="Rounds that count."
)
@runtime_option
@threads_option
@json_option
def benchmark(
    out: Path,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
    repeats: int,
    runtime: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure OUT again, dense and pruned in turn, and rewrite its benchmark.json and report.

    \b
    Example:
      nirvana-deploy benchmark smollm2-s0.4 --prompt-tokens 512 --repeats 21
    """
    from nirvana_deploy import pipeline
    from nirvana_deploy.measure.benchmark import Workload
    from nirvana_deploy.report.table import summary_table

    workload = Workload(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=repeats,
        threads=threads,
    )
    result = pipeline.benchmark_folder(out, workload=workload, runtime=runtime, progress=TerminalProgress())
    if as_json:
        echo_json(result)
        return
    table = summary_table(result)
    echo_table(table.headers, table.rows)
    click.echo(f"Report: {out / 'report.html'}")
