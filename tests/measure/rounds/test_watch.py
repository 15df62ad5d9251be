"""A busy or changing machine is named; a quiet one is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.measure.rounds.watch import (
    Sample,
    Times,
    Watch,
    cautions,
    machine_times,
    wait_until_idle,
)

QUIET = Sample(seconds=1.0, others_cores=0.02, stolen_share=0.0, kernel_ms=0.5, clock_mhz=2000.0)


def machine(others: Iterator[float]) -> Callable[[], Times]:
    """A machine of two cores, looked at twice a second, where others take so many cores."""
    seconds = accumulate(0.5 for _ in range(1000))
    busy = accumulate(0.5 * (1 + cores) for cores in others)
    own = accumulate(0.5 for _ in range(1000))
    return lambda: Times(next(seconds), next(busy), 0.0, next(own), 2)


def test_own_work_is_not_counted_as_others() -> None:
    watch = Watch(machine(iter([0, 0, 0, 1.5, 0])), lambda: 0.5)
    assert watch.sample().others_cores == pytest.approx(0)
    assert watch.sample().others_cores == pytest.approx(1.5)
    assert "other programs took 0.8 cores" in watch.record()["cautions"][0]
    assert len(watch.record()["samples"]) == 2


def test_the_real_machine_sees_what_a_child_and_a_stranger_do() -> None:
    before = machine_times()
    until = time.process_time() + 0.5
    while time.process_time() < until:
        pass
    after = machine_times()
    assert after.own - before.own >= 0.45  # systems count in ticks of 10 ms or more
    assert after.busy - before.busy >= after.own - before.own - 0.1
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        before, ends = machine_times(), time.monotonic() + 60
        while machine_times().own - before.own <= 0.2:  # of which a machine that is busy gives little
            assert time.monotonic() < ends
            time.sleep(0.1)
    finally:
        child.kill()
        child.wait()
    assert machine_times().cores == os.cpu_count()


def test_the_time_of_a_child_that_ended_stays_our_own() -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    before = machine_times()
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert machine_times().own - before.own >= 0.4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"others_cores": 1.6}, "other programs took 1.1 cores"),
        ({"stolen_share": 0.1}, "The host took 7% of this virtual machine's time away"),
        ({"clock_mhz": 1500.0}, "The clock went between 1,500 and 2,000 MHz"),
        ({"kernel_ms": 0.6}, "took 0.50 ms at first, 0.60 ms at last"),
    ],
)
def test_what_makes_timings_doubtful_is_said(change: dict[str, float], said: str | None) -> None:
    last = [replace(QUIET, **change)] * 6  # type: ignore[arg-type]
    found = cautions([QUIET, QUIET, QUIET, *last])
    assert (not found) if said is None else (len(found) == 1 and said in found[0])
    assert cautions([]) == []


def test_waiting_ends_when_the_machine_is_idle_or_the_time_is_over() -> None:
    slept: list[float] = []
    wait_until_idle(
        max_minutes=1, watch=Watch(machine(iter([0, 2, 0, 2, 0, 0, 0])), lambda: 1.0), sleep=slept.append
    )
    assert len(slept) == 3
    with pytest.raises(NirvanaError, match=r"still take 2\.0 cores after 0\.2 minutes"):
        busy = Watch(machine(iter([2.0] * 100)), lambda: 1.0)
        wait_until_idle(max_minutes=0.2, watch=busy, sleep=slept.append)
