"""Shared by commands: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from nirvana_deploy.base.progress import Advance
from nirvana_deploy.base.shown.progress import ShownProgress
from nirvana_deploy.base.terminal import harmless
from nirvana_deploy.base.units import format_seconds

from .talk import talk

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_COLOURS = {"yes": "green", "passed": "green", "no": "yellow", "not yet": "yellow", "FAILED": "red"}
"""Of words that fill a cell."""
_BETWEEN = 3
"""Characters between two columns."""


class TerminalProgress(ShownProgress):
    """Progress on stderr as ``--quiet``, ``--verbose`` and ``--log-file`` want it."""

    def __init__(self) -> None:
        super().__init__(terminal(stderr=True, highlight=False))
        self._talk = talk()
        self._draws = self._draws and not self._talk.quiet
        self._lines = 0

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """Show one task while it runs, and its seconds when it is done."""
        self.detail(f"{label} begins")
        with super().task(label, total) as advance:
            yield advance

    @contextmanager
    def within(self, heading: str, otherwise: str | None = None) -> Iterator[None]:
        """Put ``heading`` before every line inside, and say ``otherwise`` if there is none."""
        started, lines = time.perf_counter(), self._lines
        with super().within(heading):
            yield
            if otherwise is not None and self._lines == lines:
                self.note(f"{otherwise}: {format_seconds(time.perf_counter() - started)}")

    def note(self, text: str) -> None:
        """Print one line of log."""
        self._lines += 1
        self._say(text, shown=not self._talk.quiet)

    def detail(self, text: str) -> None:
        """Print one line of log if asked for more."""
        self._say(text, shown=self._talk.verbose)

    def _say(self, text: str, *, shown: bool) -> None:
        self._talk.log(self._headed(text))
        if shown:
            super().note(text)


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print text, which may hold names and words of strangers."""
    talk().log(text)
    click.echo(harmless(text), err=err, nl=nl)


def warn(cautions: Iterable[str]) -> None:
    """Print what makes a result doubtful, in red on a terminal."""
    for caution in cautions:
        talk().log(f"Caution: {caution}")
        click.secho(harmless(f"Caution: {caution}"), fg="red")


def echo_piece(text: str) -> None:
    """Print a piece of generated text: as it is into a file or pipe, harmless on a terminal."""
    click.echo(harmless(text) if sys.stdout.isatty() else text, nl=False, color=True)  # color: strip nothing


def echo_json(value: Any) -> None:
    """Print a result for machines."""
    click.echo(harmless(json.dumps({"schema": 1, **value}, indent=1)))


def terminal(**settings: Any) -> Console:
    """Return a console for tables and coloured lines; cells and lines may hold words of strangers."""
    from rich.console import Console
    from rich.text import Text

    class HarmlessConsole(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(harmless(text), **how)

    return HarmlessConsole(**settings)


def echo_table(
    headers: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    texts: int = 1,
    beside: bool = False,
) -> None:
    """Print a table: for people on a terminal, else separated by tabs with a line of headers.

    The first ``texts`` columns are text, the others numbers, or without a header pictures, which
    only people get. A table ``beside`` the result is left out with ``--quiet``.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    names = [str(header) for header in headers]
    plain = list(_separated_by_tabs(names, cells, title, texts))
    talk().log("\n".join(plain))
    if beside and talk().quiet:
        return
    if not sys.stdout.isatty():
        click.echo("\n".join(plain))
        return
    console = terminal(markup=False, highlight=False)
    if title is not None:
        console.print(title, style="bold", soft_wrap=True)
    for part in _fitting(names, cells, texts, console.width):
        console.print(_table(names, cells, part, texts))


def _separated_by_tabs(
    headers: list[str], rows: list[list[str]], title: str | None, texts: int
) -> Iterator[str]:
    told = [index for index, header in enumerate(headers) if header or index < texts]
    if title is not None:
        yield harmless(f"# {title}")
    for row in (headers, *rows):
        yield "\t".join("; ".join(harmless(row[index]).replace("\t", " ").splitlines()) for index in told)


def _fitting(headers: list[str], rows: list[list[str]], texts: int, width: int) -> Iterator[list[int]]:
    """The columns of each part of a table: numbers that find no room go on below, beside the texts again."""
    widths = [max(map(len, column)) + _BETWEEN for column in zip(headers, *rows, strict=True)]
    first = list(range(texts))
    part = list(first)
    for index in range(texts, len(headers)):
        if len(part) > texts and sum(widths[one] for one in (*part, index)) > width:
            yield part
            part = list(first)
        part.append(index)
    yield part


def _table(headers: list[str], rows: list[list[str]], part: list[int], texts: int) -> Table:
    """Some columns of a table, for a terminal; of several texts the last one is folded where it must."""
    from rich import box
    from rich.table import Table

    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    for index in part:
        left = index < texts or not headers[index]
        table.add_column(
            headers[index],
            justify="left" if left else "right",
            overflow="fold",
            no_wrap=index < texts - 1,
        )
    for row in rows:
        table.add_row(*(_coloured(row[index]) for index in part))
    return table


def _coloured(cell: str) -> Any:
    from rich.text import Text

    return Text(harmless(cell), style=_COLOURS.get(cell, ""))
