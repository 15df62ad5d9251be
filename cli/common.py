"""Shared by commands: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from nirvana_deploy.base.progress import Advance
from nirvana_deploy.base.terminal import harmless

if TYPE_CHECKING:
    from rich.console import Console


class TerminalProgress:
    """Progress on stderr: bars with an ETA on a terminal, else one line per task."""

    def __init__(self) -> None:
        self._console = terminal(stderr=True, highlight=False)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """Show one task while it runs, and its seconds when it is done."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        started = time.perf_counter()
        words = TextColumn("{task.description}", markup=False)
        columns = (words, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        if self._console.is_terminal:
            with Progress(*columns, console=self._console, transient=True) as bars:
                bar = bars.add_task(harmless(label), total=total)
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


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print text, which may hold names and words of strangers."""
    click.echo(harmless(text), err=err, nl=nl)


def echo_piece(text: str) -> None:
    """Print a piece of generated text: as it is into a file or pipe, harmless on a terminal."""
    click.echo(harmless(text) if sys.stdout.isatty() else text, nl=False, color=True)  # color: strip nothing


def echo_json(value: Any) -> None:
    """Print a result for machines."""
    echo(json.dumps({"schema": 1, **value}, indent=1))


def terminal(*, width_of_a_pipe: int | None = None, **settings: Any) -> Console:
    """Return a console for tables and coloured lines; cells and lines may hold words of strangers.

    A pipe has no width to fold for, so it may get one.
    """
    from rich.console import Console
    from rich.text import Text

    class HarmlessConsole(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(harmless(text), **how)

    console = HarmlessConsole(**settings)
    if width_of_a_pipe is not None and not console.is_terminal:
        console.width = width_of_a_pipe
    return console


def echo_table(headers: Any, rows: Any, *, title: str | None = None) -> None:
    """Print a table for people; the first column is text, the others numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for index, header in enumerate(headers):
        table.add_column(str(header), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    terminal(markup=False).print(table)
