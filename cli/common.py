"""Shared by commands: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from nirvana_deploy.base.progress import Advance


class TerminalProgress:
    """Progress on stderr: bars with an ETA on a terminal, else one line per task."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """Show one task while it runs, and its seconds when it is done."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        started = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        if self._console.is_terminal:
            with Progress(*columns, console=self._console, transient=True) as bars:
                bar = bars.add_task(label, total=total)
                yield lambda steps: bars.advance(bar, steps)
        else:
            yield lambda steps: None
        self.note(f"{label}: {time.perf_counter() - started:.1f} s")

    def note(self, text: str) -> None:
        """Print one line of log."""
        self._console.print(text, style="dim", markup=False, soft_wrap=True)


def command_line() -> str:
    """Return the command line, for the manifest."""
    return shlex.join(["nirvana-deploy", *sys.argv[1:]])


def echo_json(value: Any) -> None:
    """Print a result for machines."""
    click.echo(json.dumps({"schema": 1, **value}, indent=1))


def echo_table(headers: Any, rows: Any, *, title: str | None = None) -> None:
    """Print a table for people; the first column is text, the others numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for index, header in enumerate(headers):
        table.add_column(str(header), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
