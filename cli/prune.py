"""``nirvana-deploy prune MODEL``: the first half of the job, or the cut of an existing plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import TerminalProgress, echo, echo_json
from .forecast_page import show_forecast
from .job import (
    curves_option,
    folder_options,
    given_curves,
    job_from,
    model_argument,
    pruning_options,
    recipe_option,
)
from .options import json_option, typed
from .talk import command_line


@click.command("prune")
@model_argument
@pruning_options
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    default=None,
    help="Cut by this plan.json instead of scoring; needs --out.",
)
@curves_option
@recipe_option
@folder_options
@json_option
def prune(
    model: str | None,
    plan_file: Path | None,
    curves_at: Path | None,
    recipe_file: Path | None,
    out: Path | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Score MODEL, decide what goes, and write plan.json and checkpoint/.

    'nirvana-deploy prune-export' with the same options and --resume continues from there.

    \b
    Examples:
      nirvana-deploy prune smollm2 --sparsity 0.4 --out smollm2-small
      nirvana-deploy prune smollm2 --sparsity 0.4 --preset paper --out smollm2-nirvana
      nirvana-deploy prune smollm2 --sparsity 0.2 --curves smollm2-small --out smollm2-larger
      nirvana-deploy prune smollm2 --plan smollm2-small/plan.json --out again
      torchrun --nproc-per-node 2 -m nirvana_deploy prune ./my-llama --sparsity 0.4
    """
    if plan_file is not None and out is None:
        raise click.UsageError("--plan needs --out DIR.")
    if plan_file is not None and typed(options).get("reconstruct"):
        raise click.UsageError(
            "--plan reads no calibration text, which --reconstruct needs; pass --sparsity."
        )
    if plan_file is not None and curves_at is not None:
        raise click.UsageError("--plan has decided what goes: leave out --curves.")
    if plan_file is not None and model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    if plan_file is not None and dry_run:
        raise click.UsageError("--plan takes seconds: leave out --dry-run.")
    shared: dict[str, Any] = {"force": force, "command": command_line(), "progress": TerminalProgress()}
    curves = given_curves(curves_at)
    job = None if plan_file is not None else job_from(model, recipe_file, options, curves)
    if job is not None and dry_run:
        from nirvana_deploy.pipeline.forecast.forecast import forecast

        how: dict[str, Any] = {"resume": resume, "force": force, "progress": shared["progress"]}
        planned = forecast(job, out=out, until="checkpoint", curves=curves, **how)
        show_forecast(planned, as_json=as_json)
        return
    from nirvana_deploy.pipeline.prune_export import prune_by_plan, run_job

    if job is None:
        assert model is not None and plan_file is not None and out is not None
        plan = prune_by_plan(model, plan=plan_file, out=out, **shared)
    else:
        done = run_job(job, out=out, until="checkpoint", resume=resume, curves=curves, **shared)
        out, plan = done.out, done.plan
    budget = plan.budget
    if as_json:
        echo_json({"out": str(out), "met_removed_share": budget.met_removed_share})
        return
    echo(
        f"Removed {budget.removed_groups} of {budget.of_groups} KV groups and "
        f"{budget.removed_neurons_after_rounding} of {budget.of_neurons} FFN neurons: "
        f"{budget.met_removed_share:.1%} of the decoder's linear weights.\n"
        f"Plan: {out / 'plan.json'}\nCheckpoint: {out / 'checkpoint'}"
    )
