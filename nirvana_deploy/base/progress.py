"""Progress reporting. The library prints nothing; the caller passes a :class:`Progress`.

Every function that may take more than two seconds accepts ``progress``; the command line draws bars with an
ETA on stderr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Called with the number of steps just finished."""


class Progress(Protocol):
    """Receiver of progress and log lines."""

    def task(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Open a task of ``total`` equal steps; the yielded function advances it."""
        ...

    def within(self, heading: str, otherwise: str | None = None) -> AbstractContextManager[None]:
        """Put ``heading`` ("3 of 11") before every line inside, and say ``otherwise`` if there is none."""
        ...

    def note(self, text: str) -> None:
        """Log one line."""
        ...

    def detail(self, text: str) -> None:
        """Log one line for those who asked for more."""
        ...


class SilentProgress:
    """The default: drops everything."""

    def __repr__(self) -> str:
        return "SILENT"

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """Open a task without showing it."""
        yield lambda steps: None

    @contextmanager
    def within(self, heading: str, otherwise: str | None = None) -> Iterator[None]:
        """Drop the heading."""
        yield

    def note(self, text: str) -> None:
        """Drop the line."""

    def detail(self, text: str) -> None:
        """Drop the line."""


SILENT: Progress = SilentProgress()
