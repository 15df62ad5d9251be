"""How far a search is, in words: cuts done, failed and running, and the time that is left."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from nirvana_deploy.base.units import format_seconds


@dataclass
class Tally:
    """Counts of cuts that are made turn by turn, those of one turn at the same time."""

    total: int
    at_a_time: int | None
    """None where a cluster decides."""
    done: int = 0
    failed: int = 0
    _turn: int = 0
    _ended: int = 0
    """Of the cuts of this turn."""
    _since: float = field(default_factory=time.perf_counter)

    def begin(self, turn: int) -> None:
        """A turn of so many cuts begins."""
        self._turn, self._ended, self._since = turn, 0, time.perf_counter()

    def ended(self, *, failed: bool) -> str:
        """Count a cut that has ended; returns where the search is then."""
        self._ended += 1
        self.failed += failed
        self.done += not failed
        left = self._turn - self._ended
        running = left if self.at_a_time is None else min(left, self.at_a_time)
        words = [f"{self.done} of {self.total} cuts done"]
        words += [f"{self.failed} failed"] if self.failed else []
        words += [f"{running} {'on the cluster' if self.at_a_time is None else 'running'}"] if running else []
        seconds = self._seconds_left()
        words += [f"about {format_seconds(seconds)} left"] if seconds else []
        return ", ".join(words)

    def _seconds_left(self) -> float | None:
        """At the pace of this turn; None where nothing is left or its only cut says nothing of a pace."""
        left = self.total - self.done - self.failed
        together = 1
        if self._turn == 1:  # others will be made at the same time
            if self.at_a_time is None:
                return None
            together = min(self.at_a_time, max(left, 1))
        return left * (time.perf_counter() - self._since) / self._ended / together
