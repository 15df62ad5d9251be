"""Interrupts that wait for the end of a block; Python's own handlers are back behind it."""

from __future__ import annotations

import signal
import threading

import pytest

from nirvana_deploy.runtime.tensorrt.interrupts import late_interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_end_of_the_block(number: signal.Signals) -> None:
    before, done = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), late_interrupts():
        signal.raise_signal(number)
        done.append("the rest")
    assert done and signal.getsignal(number) is before


def test_an_interrupt_goes_before_an_error_of_the_block() -> None:
    with pytest.raises(KeyboardInterrupt), late_interrupts():
        signal.raise_signal(signal.SIGINT)
        raise ValueError
    with pytest.raises(ValueError), late_interrupts():
        raise ValueError


def test_another_thread_has_none_to_wait_for() -> None:
    done: list[str] = []

    def work() -> None:
        with late_interrupts():
            done.append("worked")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["worked"]


def test_an_interrupt_that_the_user_ignores_stays_ignored() -> None:
    """As under nohup, or in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with late_interrupts():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
