"""``nirvana-deploy prune MODEL``: the first half of the job, or the cut of an existing plan."""

from __future__ import annotations

from typing import Any

import click

from .common import TerminalProgress, command_line, echo_json, json_option, pruning_options


@click.command("prune")
@click.argument("model")
@pruning_options
@json_option
def prune(model: str, as_json: bool, **options: Any) -> None:
    """Score MODEL, decide what goes, and write plan.json and checkpoint/.

    'nirvana-deploy prune-export' with the same options and --resume continues from there.

    \b
    Example:
      nirvana-deploy prune smollm2 --sparsity 0.4 --out smollm2-small
    """
    from nirvana_deploy import pipeline

    done = pipeline.prune_export(
        model, until="checkpoint", command=command_line(), progress=TerminalProgress(), **options
    )
    out, budget = done.out, done.plan.budget
    if as_json:
        echo_json({"out": str(out), "met_removed_share": budget.met_removed_share})
        return
    click.echo(
        f"Removed {budget.removed_groups} of {budget.of_groups} KV groups and "
        f"{budget.removed_neurons_after_rounding} of {budget.of_neurons} FFN neurons: "
        f"{budget.met_removed_share:.1%} of the decoder's linear weights.\n"
        f"Plan: {out / 'plan.json'}\nCheckpoint: {out / 'checkpoint'}"
    )
