"""``nirvana-deploy doctor``: what works on this machine, and the pip command for what does not."""

from __future__ import annotations

import dataclasses
import itertools

import click

from .common import echo_json, terminal


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")
def doctor(as_json: bool) -> None:
    """List runtimes, extras, CPU, memory and disk: what is usable here, and how to get the rest.

    \b
    Example:
      nirvana-deploy doctor
      nirvana-deploy doctor --json | jq '.findings[] | select(.usable | not)'
    """
    from nirvana_deploy.runtime.doctor import examine_machine

    findings = examine_machine()
    if as_json:
        echo_json({"findings": [dataclasses.asdict(f) for f in findings]})
        return

    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console = terminal(width_of_a_pipe=160)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "name", "found", "to get it"):
        table.add_column(column, overflow="fold")
    for _, section in itertools.groupby(findings, key=lambda finding: finding.section):
        for finding in section:
            mark = "[green]yes[/]" if finding.usable else "[yellow]no[/]"
            table.add_row(mark, escape(finding.name), escape(finding.detail), escape(finding.fix or ""))
        table.add_section()
    console.print(table)
