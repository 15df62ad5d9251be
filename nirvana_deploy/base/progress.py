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

    def note(self, text: str) -> None:
        """Log one line."""
        ...


class SilentProgress:
    """The default: drops everything."""

    def __repr__(self) -> str:
        return "SILENT"

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """Open a task without showing it."""
        yield lambda steps: None

    def note(self, text: str) -> None:
        """Drop the line."""


SILENT: Progress = SilentProgress()
