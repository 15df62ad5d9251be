"""``nirvana-deploy doctor``: what works on this machine, and the pip command for what does not."""

from __future__ import annotations

import dataclasses
import itertools
import json

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")
def doctor(as_json: bool) -> None:
    """List runtimes, extras, CPU, memory and disk: what is usable here, and how to get the rest.

    \b
    Example:
      nirvana-deploy doctor
      nirvana-deploy doctor --json | jq '.findings[] | select(.usable | not)'
    """
    from nirvana_deploy.runtime.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps({"schema": 1, "findings": [dataclasses.asdict(f) for f in findings]}, indent=1))
        return

    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width to fold for
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "name", "found", "to get it"):
        table.add_column(column, overflow="fold")
    for _, section in itertools.groupby(findings, key=lambda finding: finding.section):
        for finding in section:
            mark = "[green]yes[/]" if finding.usable else "[yellow]no[/]"
            table.add_row(mark, escape(finding.name), escape(finding.detail), escape(finding.fix or ""))
        table.add_section()
    console.print(table)
