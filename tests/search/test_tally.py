"""What is said of a search while it goes on."""

from __future__ import annotations

import pytest

from nirvana_deploy.search import tally as tallies
from nirvana_deploy.search.tally import Tally


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test moves."""
    now = [0.0]
    monkeypatch.setattr(tallies.time, "perf_counter", lambda: now[0])
    return now


def ended(tally: Tally, clock: list[float], seconds: float, *, failed: bool = False) -> str:
    clock[0] += seconds
    return tally.ended(failed=failed)


def test_cuts_done_failed_and_running_with_the_time_left(clock: list[float]) -> None:
    tally = Tally(6, at_a_time=2)
    tally.begin(1)
    assert ended(tally, clock, 8) == "1 of 6 cuts done, about 20.0 s left"  # five in pairs, of 8 s each
    tally.begin(5)
    assert ended(tally, clock, 4) == "2 of 6 cuts done, 2 running, about 16.0 s left"
    said = ended(tally, clock, 0, failed=True)
    assert said == "2 of 6 cuts done, 1 failed, 2 running, about 6.00 s left"
    ended(tally, clock, 4)
    assert ended(tally, clock, 0).endswith("1 failed, 1 running, about 2.00 s left")
    assert ended(tally, clock, 2) == "5 of 6 cuts done, 1 failed"


def test_a_cluster_decides_how_many_run(clock: list[float]) -> None:
    tally = Tally(4, at_a_time=None)
    tally.begin(1)
    assert ended(tally, clock, 8) == "1 of 4 cuts done"
    tally.begin(3)
    assert ended(tally, clock, 4) == "2 of 4 cuts done, 2 on the cluster, about 8.00 s left"
