"""SIGINT and SIGTERM beside foreign code that calls back into Python and drops what a callback raises."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def kept_interrupts(keep: Callable[[BaseException], None]) -> Iterator[None]:
    """Within the block, pass SIGINT and SIGTERM to ``keep`` as a KeyboardInterrupt instead of raising one.

    The caller ends its work soon and raises what was kept. An interrupt raised inside of a callback may be
    dropped by the code that called, and the callback's work with it: half of a file goes missing, and nobody
    hears of it. Python delivers signals to the main thread alone; in another one there is nothing to keep.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        keep(KeyboardInterrupt())

    wanted = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def late_interrupts() -> Iterator[None]:
    """Raise an interrupt at the end of the block, for foreign code that takes no sign to stop.

    TensorRT's bindings call a logger a thousand times while they parse: one raised there is always dropped.
    """
    kept: list[BaseException] = []
    try:
        with kept_interrupts(kept.append):
            yield
    finally:
        if kept:
            raise kept[0]
