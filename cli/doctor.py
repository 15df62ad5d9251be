"""``nirvana-deploy doctor``: what works on this machine, and the pip command for what does not."""

from __future__ import annotations

import dataclasses

import click

from .common import echo_json, echo_table
from .options import json_option


@click.command("doctor")
@json_option
def doctor(as_json: bool) -> None:
    """List runtimes, extras, CPU, memory and disk: what is usable here, and how to get the rest.

    \b
    Examples:
      nirvana-deploy doctor
      nirvana-deploy doctor --json | jq '.findings[] | select(.usable | not)'
    """
    from nirvana_deploy.runtime.doctor import examine_machine

    findings = examine_machine()
    if as_json:
        echo_json({"findings": [dataclasses.asdict(f) for f in findings]})
        return

    rows = (
        ["yes" if one.usable else "no", one.name, f"{one.detail}\n{one.fix}" if one.fix else one.detail]
        for one in findings
    )
    echo_table(["usable", "name", "found, and how to get it"], rows, texts=3)
