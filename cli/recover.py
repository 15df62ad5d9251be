"""``nirvana-deploy recover OUT``: train the pruned model toward the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nirvana_deploy.recover.recipe import Length, Ready, Recovery

from .arguments import OUTPUT
from .common import TerminalProgress, echo, echo_json, echo_table
from .forecast_page import show_forecast
from .job import dry_run_option
from .options import json_option, recipe_options, taken, typed
from .talk import command_line


@click.command("recover")
@click.argument("out", type=OUTPUT)
@recipe_options(Length, Ready, Recovery, without=["recover"])
@dry_run_option
@json_option
def recover(out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train the pruned model in OUT toward the dense one, and make anew what was made from it.

    A killed training goes on when the command is repeated.

    \b
    Examples:
      nirvana-deploy recover smollm2-s0.4 --minutes 30
      nirvana-deploy recover smollm2-s0.4 --tokens 200000 --recover-method lora
      nirvana-deploy recover smollm2-s0.4 --minutes 60 --recover-text handbook.txt:0.5,self
      nirvana-deploy recover smollm2-s0.4 --tokens 200000 --preset paper --recover-text alpaca.jsonl
      torchrun --nproc-per-node 2 -m nirvana_deploy recover smollm2-s0.4 --tokens 2000000
    """
    length = taken(Length, options)
    if (length.minutes is None) == (length.tokens is None):
        raise click.UsageError("Say how long: --minutes M or --tokens N, one of them.")
    from nirvana_deploy.pipeline.folder import forecast_recovery, recover_folder
    from nirvana_deploy.recover.budget import typed_as

    budget = f"{length.minutes:g}m" if length.minutes is not None else f"{length.tokens}"
    option = "--tokens" if length.minutes is None else "--minutes"
    chosen: dict[str, Any] = {**typed(options), "recover": budget}
    progress = TerminalProgress()
    with typed_as(option):
        if dry_run:
            show_forecast(forecast_recovery(out, progress=progress, **chosen), as_json=as_json)
            return
        done = recover_folder(out, command=command_line(), progress=progress, **chosen)
    found = done.manifest["stages"]["recover"]["result"]
    if as_json:
        echo_json(found)
        return
    other = found.get("other_text")
    rows = [
        [f"{one['step']:,}", f"{one['tokens']:,}", f"{one['seconds'] / 60:.1f}", f"{one['kl']:.3f}"]
        + ([f"{one['other_kl']:.3f}"] if other else [])
        for one in found["curve"]
    ]
    beside = [f"On {other}, not trained on"] if other else []
    echo_table(
        ["Step", "Tokens", "Minutes", "Held-out KL, nats", *beside],
        rows,
        title=f"Trained on {found['text']}",
        beside=True,
    )
    if stopped := found.get("stopped"):
        echo(stopped)
    echo(f"Kept: step {found['kept_step']:,}" + (f". Report: {done.report}" if done.report else ""))
