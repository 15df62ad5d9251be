"""How the library reports progress: through a seam that the caller fills. The library prints nothing.

Every function that can take more than two seconds accepts ``progress``; the command line passes one
that draws bars with an ETA on stderr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Call with the number of steps just finished."""


class Progress(Protocol):
    """What a caller may pass to see how far a stage has come."""

    def task(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Open a task of ``total`` equal steps; the yielded function advances it."""
        ...

    def note(self, text: str) -> None:
        """Say one line of log."""
        ...


class SilentProgress:
    """The default: reports to nobody."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """Open a task that nobody sees."""
        yield lambda steps: None

    def note(self, text: str) -> None:
        """Drop the line."""


SILENT: Progress = SilentProgress()
