"""``nirvana-deploy prune-export MODEL``: the whole job."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from nirvana_deploy.search.recipe import Target

from .common import TerminalProgress, echo, echo_json, echo_table, warn
from .forecast_page import show_forecast, show_target
from .job import (
    curves_option,
    deployment_options,
    folder_options,
    given_curves,
    job_from,
    model_argument,
    pruning_options,
    recipe_option,
)
from .options import json_option, recipe_options, taken, typed
from .talk import command_line, talk


@click.command("prune-export")
@model_argument
@pruning_options
@recipe_options(Target)
@deployment_options
@curves_option
@recipe_option
@folder_options
@json_option
def prune_export(
    model: str | None,
    curves_at: Path | None,
    recipe_file: Path | None,
    out: Path | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Prune MODEL, export it to ONNX, verify it, measure it against dense, write a report.

    MODEL is an alias ('nirvana-deploy models'), a hub id, a folder with safetensors, or a .gguf file.

    \b
    Examples:
      nirvana-deploy prune-export smollm2 --sparsity 0.4
      nirvana-deploy prune-export smollm2 --sparsity 0.2 --quantize int8,w4 --dry-run
      nirvana-deploy prune-export smollm2 --sparsity 0.2 --quantize int8,w4 --engine tensorrt-rtx
      nirvana-deploy prune-export ./my-llama --sparsity 0.3 --calib notes.txt --out my-llama-small
      nirvana-deploy prune-export smollm2 --max-perplexity-ratio 1.3 --quantize w4
      nirvana-deploy prune-export --recipe smollm2-s0.4/recipe.toml --out again
    """
    target = taken(Target, options)
    if target.asked and recipe_file is not None:
        raise click.UsageError("A budget finds the sparsity: leave out --recipe.")
    if target.asked and curves_at is not None:
        raise click.UsageError("A budget measures curves once for all that it tries: leave out --curves.")
    curves = given_curves(curves_at)
    job = None if target.asked else job_from(model, recipe_file, options, curves)
    how: dict[str, Any]
    if job is not None and dry_run:
        from nirvana_deploy.pipeline.forecast.forecast import forecast

        how = {"resume": resume, "force": force, "progress": TerminalProgress()}
        planned = forecast(job, out=out, curves=curves, **how)
        show_forecast(planned, as_json=as_json)
        return
    if job is None and model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    if model is not None and dry_run:
        from nirvana_deploy.pipeline.forecast.target import forecast_target

        how = {"out": out, "resume": resume, "force": force, "progress": TerminalProgress()}
        show_target(forecast_target(model, target, **how, **typed(options)), as_json=as_json)
        return
    from nirvana_deploy.base.units import format_bytes, format_seconds
    from nirvana_deploy.output.variants import variant_named
    from nirvana_deploy.pipeline.prune_export import run_job
    from nirvana_deploy.report.table import summary_table

    short: str | None = None
    how = {"resume": resume, "force": force, "command": command_line(), "progress": TerminalProgress()}
    if job is not None:
        done = run_job(job, out=out, curves=curves, **how)
    else:
        from nirvana_deploy.pipeline.searching.target import meet_target

        assert model is not None
        met = meet_target(model, target, out=out, **how, **typed(options))
        done, short = met.deployment, met.shortfall
    if as_json:
        echo_json(
            {
                "out": str(done.out),
                "report": str(done.report),
                "manifest": done.manifest,
                "benchmark": done.benchmark,
                "verdict": None if done.verdict is None else asdict(done.verdict),
                **({} if short is None else {"shortfall": short}),
            }
        )
        return
    stages = done.manifest["stages"]
    echo_table(
        ["Stage", "Time", "CPU time", "Peak memory"],
        [
            [
                name,
                format_seconds(s["seconds"]),
                format_seconds(s["cpu_seconds"]),
                format_bytes(s["peak_rss_bytes"]),
            ]
            for name, s in stages.items()
        ],
        title="Where the time went",
        beside=True,
    )
    if done.benchmark is not None:
        if not talk().quiet:
            warn(done.benchmark["watch"]["cautions"])
        table = summary_table(done.benchmark)
        title = f"{done.plan.model['name']}, sparsity {done.plan.sparsity:g}"
        echo_table(table.headers, table.rows, title=title, beside=True)
    if short is not None:
        echo(f"Sparsity {done.plan.sparsity:g} meets the budget. {short}")
    if done.verdict is not None:
        echo(f"{done.verdict.title}. {done.verdict.why}")
    echo(f"Report: {done.report}")
    if done.verdict is not None and done.verdict.recommended is not None:
        echo(f"Try it: {_trial(done.out / variant_named(done.verdict.recommended).folder)}")


def _trial(folder: Path) -> str:
    """The command that lets a model write."""
    from nirvana_deploy.verify.cases import PROMPTS

    return f"nirvana-deploy generate {shlex.quote(str(folder))} --prompt {shlex.quote(PROMPTS[0])}"
