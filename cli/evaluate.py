"""``nirvana-deploy evaluate OUT``: measure quality again, on any text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nirvana_deploy.measure.recipe import Evaluation
from nirvana_deploy.runtime.recipe import Place

from .arguments import OUTPUT
from .common import TerminalProgress, echo, echo_json, echo_table
from .options import json_option, recipe_options, taken


@click.command("evaluate")
@click.argument("out", type=OUTPUT)
@recipe_options(Evaluation, Place)
@json_option
def evaluate(out: Path, as_json: bool, **options: Any) -> None:
    """Measure perplexity, and KL against dense, of the ONNX models in OUT; rewrites the report.

    With --tasks also zero-shot accuracy, by lm-evaluation-harness. A .jsonl file is one task, named after the
    file, and needs no network. Its rows have the keys query, choices, gold (an index); or context_options,
    continuation, gold; or context, continuation (every token of it must be the likeliest).

    \b
    Examples:
      nirvana-deploy evaluate smollm2-s0.4 --eval-text handbook.txt --eval-text tickets.txt --window 512
      nirvana-deploy evaluate smollm2-s0.4 --ntk
      nirvana-deploy evaluate smollm2-s0.4 --tasks piqa.jsonl,winogrande.jsonl --limit 100
      nirvana-deploy evaluate smollm2-s0.4 --tasks piqa,arc_easy --limit 100
      nirvana-deploy evaluate smollm2-s0.4 --tasks mine --include-path my-tasks
    """
    from nirvana_deploy.pipeline.folder import evaluate_folder

    recipe, place = taken(Evaluation, options), taken(Place, options)
    if recipe.tasks is None and (recipe.tasks_on or recipe.task_folder or recipe.limit):
        raise click.UsageError("--tasks-on, --include-path and --limit are about --tasks; it is missing.")
    if not recipe.eval_text and (recipe.window_tokens or recipe.max_windows):
        raise click.UsageError("--window and --max-windows cut --eval-text into windows; it is missing.")
    result = evaluate_folder(out, recipe, place, progress=TerminalProgress())
    if as_json:
        echo_json(result)
        return
    if "variants" in result:
        _show_quality(result)
    if "ntk" in result:
        _show_kernel(result["ntk"])
    if "tasks" in result:
        _show_tasks(result["tasks"])


def _show_quality(result: dict[str, Any]) -> None:
    from nirvana_deploy.report.table import quality_table

    table = quality_table(result)
    echo_table(table.headers, table.rows, title=result["source"])


def _show_kernel(record: dict[str, Any]) -> None:
    from nirvana_deploy.report.pages.ntk import explain, headers, rows

    echo_table(headers(record), rows(record), title="Change of the tangent kernel")
    echo("\n" + "\n\n".join(explain(record)))


def _show_tasks(record: dict[str, Any]) -> None:
    from nirvana_deploy.report.pages.tasks import headers, rows

    echo_table(headers(record), rows(record), title="lm-evaluation-harness")
