"""``nirvana-deploy prune MODEL``: the first half of the job, or the cut of an existing plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import (
    TerminalProgress,
    command_line,
    echo_json,
    json_option,
    pruning_options,
    require_sparsity,
)


@click.command("prune")
@click.argument("model")
@pruning_options
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    default=None,
    help="Cut by this plan.json instead of scoring; needs --out.",
)
@json_option
def prune(model: str, plan_file: Path | None, as_json: bool, **options: Any) -> None:
    """Score MODEL, decide what goes, and write plan.json and checkpoint/.

    'nirvana-deploy prune-export' with the same options and --resume continues from there.

    \b
    Examples:
      nirvana-deploy prune smollm2 --sparsity 0.4 --out smollm2-small
      nirvana-deploy prune smollm2 --sparsity 0.4 --reconstruct --out smollm2-refitted
      nirvana-deploy prune smollm2 --plan smollm2-small/plan.json --out again
    """
    if plan_file is None:
        require_sparsity(options)
    elif options["out"] is None:
        raise click.UsageError("--plan needs --out DIR.")
    elif options["reconstruct"]:
        raise click.UsageError(
            "--plan reads no calibration text, which --reconstruct needs; pass --sparsity."
        )
    from nirvana_deploy import pipeline

    out: Path
    shared: dict[str, Any] = {"command": command_line(), "progress": TerminalProgress()}
    if plan_file is not None:
        out, force = options["out"], options["force"]
        plan = pipeline.prune_by_plan(model, plan=plan_file, out=out, force=force, **shared)
    else:
        done = pipeline.prune_export(model, until="checkpoint", **shared, **options)
        out, plan = done.out, done.plan
    budget = plan.budget
    if as_json:
        echo_json({"out": str(out), "met_removed_share": budget.met_removed_share})
        return
    click.echo(
        f"Removed {budget.removed_groups} of {budget.of_groups} KV groups and "
        f"{budget.removed_neurons_after_rounding} of {budget.of_neurons} FFN neurons: "
        f"{budget.met_removed_share:.1%} of the decoder's linear weights.\n"
        f"Plan: {out / 'plan.json'}\nCheckpoint: {out / 'checkpoint'}"
    )
