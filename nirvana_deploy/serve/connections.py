"""Connections that ask for nothing are closed, so that those that do find a place.

Half a request, or none, holds a socket for :data:`IDLE_SECONDS` to twice as long; where there are too many
connections, the one that has been idle for longest goes at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from nirvana_deploy.base.machine import allow_open_files

IDLE_SECONDS = 10.0
MOST_CONNECTIONS = 512
"""Beside those of requests that are answered, or wait for it."""
_OTHER_FILES = 128
"""Descriptors of the model, the log and the child process, with room to spare."""


def connection_protocol(*, requests: int, request_seconds: float) -> Callable[..., asyncio.Protocol]:
    """What uvicorn is to make of each connection: its own protocol, looked after.

    ``requests`` may be answered or wait at a time; there is room for all of them, open files permitting.
    """
    most = MOST_CONNECTIONS + requests
    most = min(most, allow_open_files(most + _OTHER_FILES) - _OTHER_FILES)
    idle: dict[Connection, None] = {}

    def made(**of_server: Any) -> asyncio.Protocol:
        return Connection(H11Protocol(**of_server), idle, most=max(1, most), busy_seconds=request_seconds)

    return made


class Connection(asyncio.Protocol):
    """One connection: what happens goes to uvicorn's protocol, whose progress is looked at now and then."""

    def __init__(
        self, inner: H11Protocol, idle: dict[Connection, None], *, most: int, busy_seconds: float
    ) -> None:
        self._inner, self._idle, self._most = inner, idle, most
        self._looks = max(2, 1 + round(busy_seconds / IDLE_SECONDS))
        """How often the same request may be seen at work."""
        self._timer: asyncio.TimerHandle | None = None
        self._seen: Any = None
        self._times = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Make room if there is none, and begin to look."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._inner.connection_made(transport)
        self._idle[self] = None
        if len(self._inner.connections) > self._most:
            longest_idle = next((one for one in self._idle if one is not self), self)
            longest_idle.abort()
        self._look_later()

    def abort(self) -> None:
        """Close the connection at once."""
        self._idle.pop(self, None)
        self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Stop looking."""
        self._idle.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
        self._inner.connection_lost(error)

    def data_received(self, data: bytes) -> None:
        """Pass it on; a request makes the connection a busy one."""
        self._inner.data_received(data)
        if self._at_work() is not None:
            self._idle.pop(self, None)

    def eof_received(self) -> None:
        """Pass it on."""
        self._inner.eof_received()

    def pause_writing(self) -> None:
        """Pass it on."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on."""
        self._inner.resume_writing()

    def _at_work(self) -> Any:
        """The request that is being answered; None for none."""
        cycle = self._inner.cycle
        return None if cycle is None or cycle.response_complete else cycle

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._look)

    def _look(self) -> None:
        """Close the connection if nothing has happened since the last look, or one request takes too long."""
        now = self._at_work()
        self._times = self._times + 1 if now is self._seen else 1
        self._seen = now
        if self._times >= (2 if now is None else self._looks):
            return self.abort()
        if now is None:
            self._idle[self] = None
        self._look_later()
