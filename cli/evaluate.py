"""``nirvana-deploy evaluate OUT``: measure quality again, on any text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from .common import TerminalProgress, echo_json, echo_table, json_option, runtime_option, threads_option


@click.command("evaluate")
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--eval-text",
    type=click.Path(path_type=Path),
    default=None,
    help="Text to measure on. [the windows that calibration held out]",
)
@click.option(
    "--window",
    "window_tokens",
    type=click.IntRange(min=2),
    default=None,
    help="Tokens a window of --eval-text, for example 512 or 2048. [256]",
)
@click.option(
    "--max-windows",
    type=click.IntRange(min=1),
    default=None,
    help="Windows of --eval-text, from its beginning. [16]",
)
@click.option("--ntk", is_flag=True, help="Also measure how far the cut changed the tangent kernel.")
@click.option(
    "--ntk-windows",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Held-out windows that --ntk reads.",
)
@click.option("--tasks", default=None, help="Tasks of lm-evaluation-harness, comma-separated: piqa,arc_easy.")
@click.option(
    "--tasks-on",
    type=click.Choice(["onnx", "checkpoint", "both"]),
    default=None,
    help="Which models --tasks runs on. [onnx, where there is one: what is deployed]",
)
@click.option(
    "--include-path",
    "task_folder",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder with the yaml files of further tasks.",
)
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Examples of each task. [all]")
@runtime_option
@threads_option
@json_option
def evaluate(
    out: Path,
    eval_text: Path | None,
    window_tokens: int | None,
    max_windows: int | None,
    ntk: bool,
    ntk_windows: int,
    tasks: str | None,
    tasks_on: Literal["onnx", "checkpoint", "both"] | None,
    task_folder: Path | None,
    limit: int | None,
    runtime: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure perplexity, and KL against dense, of the ONNX models in OUT; rewrites the report.

    \b
    Example:
      nirvana-deploy evaluate smollm2-s0.4 --eval-text handbook.txt --window 512
      nirvana-deploy evaluate smollm2-s0.4 --ntk
      nirvana-deploy evaluate smollm2-s0.4 --tasks piqa,arc_easy --limit 100
      nirvana-deploy evaluate smollm2-s0.4 --tasks mine --include-path my-tasks
    """
    from nirvana_deploy.pipeline import evaluate_folder

    if tasks is None and (tasks_on or task_folder or limit):
        raise click.UsageError("--tasks-on, --include-path and --limit are about --tasks; it is missing.")
    if eval_text is None and (window_tokens or max_windows):
        raise click.UsageError("--window and --max-windows cut --eval-text into windows; it is missing.")
    result = evaluate_folder(
        out,
        eval_text=eval_text,
        window_tokens=window_tokens,
        max_windows=max_windows,
        ntk_windows=ntk_windows if ntk else None,
        task_names=tuple(name.strip() for name in (tasks or "").split(",") if name.strip()),
        task_limit=limit,
        task_folder=task_folder,
        tasks_on=tasks_on,
        threads=threads,
        runtime=runtime,
        progress=TerminalProgress(),
    )
    if as_json:
        echo_json(result)
        return
    if "variants" in result:
        _show_quality(result)
    if "ntk" in result:
        _show_kernel(result["ntk"])
    if "tasks" in result:
        _show_tasks(result["tasks"]["variants"])


def _show_quality(result: dict[str, Any]) -> None:
    from nirvana_deploy.report.table import format_number

    rows = []
    for name, found in result["variants"].items():
        kl = (
            "-"
            if found["kl_vs_dense"] is None
            else f"{found['kl_vs_dense']:.3f} ± {found['kl_standard_error'] or 0:.3f}"
        )
        rows.append([name, format_number(found["perplexity"]), kl, f"{found['tokens']:,}"])
    echo_table(["Variant", "Perplexity", "KL vs dense, nats", "Tokens"], rows, title=result["source"])


def _show_kernel(record: dict[str, Any]) -> None:
    from nirvana_deploy.report.ntk_page import explain, headers, rows

    echo_table(headers(record), rows(record), title="Change of the tangent kernel")
    click.echo("\n" + "\n\n".join(explain(record)))


def _show_tasks(variants: dict[str, Any]) -> None:
    from nirvana_deploy.report.table import format_number

    rows = [
        [f"{task} {metric}", name, format_number(value)]
        for name, found in variants.items()
        for task, metrics in found.items()
        for metric, value in metrics.items()
    ]
    echo_table(["Task", "Variant", "Value"], sorted(rows), title="lm-evaluation-harness")
