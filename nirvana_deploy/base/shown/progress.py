"""Progress that a person sees, in a terminal or a notebook."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nirvana_deploy.base.progress import Advance
from nirvana_deploy.base.terminal import harmless
from nirvana_deploy.base.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars


class ShownProgress:
    """Pass one as ``progress`` to see what a function does.

    A bar with the time left in a terminal, and in a notebook where ipywidgets is installed; everywhere one
    line on stderr for each task that is done.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True, highlight=False)
        widgets = self._console.is_jupyter and find_spec("ipywidgets") is not None
        self._draws = self._console.is_terminal or widgets
        self._bars: Bars | None = None
        self._headings: list[str] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """Show one task while it runs, and its seconds when it is done."""
        started = time.perf_counter()
        if self._draws:
            with self._drawn() as bars:
                bar = bars.add_task(harmless(self._headed(label)), total=total)
                try:
                    yield lambda steps: bars.advance(bar, steps)
                finally:
                    bars.remove_task(bar)
        else:
            yield lambda steps: None
        self.note(f"{label}: {format_seconds(time.perf_counter() - started)}")

    @contextmanager
    def within(self, heading: str, otherwise: str | None = None) -> Iterator[None]:
        """Put ``heading`` ("3 of 11") before every line inside."""
        self._headings.append(heading)
        try:
            yield
        finally:
            self._headings.pop()

    def note(self, text: str) -> None:
        """Print one line."""
        self._console.print(harmless(self._headed(text)), style="dim", markup=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        """Drop a line that few want."""

    def _headed(self, text: str) -> str:
        return f"{', '.join(self._headings)}: {text}" if self._headings else text

    @contextmanager
    def _drawn(self) -> Iterator[Bars]:
        """The bars on show: a task within a task has its bar below."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        if self._bars is not None:
            yield self._bars
            return
        words = TextColumn("{task.description}", markup=False)
        columns = (words, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as self._bars:
            try:
                yield self._bars
            finally:
                self._bars = None
