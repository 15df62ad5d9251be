"""What stands before the routes: the bearer token, the limit of a body in bytes and seconds, the counts.

Plain ASGI, so that a refusal is sent before a body is read and a stream passes as it is written.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nirvana_deploy.base.errors import unforeseen
from nirvana_deploy.base.units import format_bytes
from nirvana_deploy.serve.errors import Refused, fault, refusal

OPEN_ROUTES = ("/health",)
"""Answered without a token."""
_BODY_SECONDS = 30.0
_STARTED = "http.response.start"


def key_checked(app: ASGIApp, key: str | None) -> ASGIApp:
    """Refuse requests that do not show the bearer token ``key``, if any."""
    if key is None:
        return app
    wanted = f"Bearer {key}".encode()

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_ROUTES:
            shown = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(shown, wanted):
                said = "is missing" if not shown else "is wrong"
                refused = Refused(
                    401,
                    f"The bearer token {said}: send the header Authorization: Bearer TOKEN.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                return await refusal(refused)(scope, receive, send)
        await app(scope, receive, send)

    return checked


def body_limited(app: ASGIApp, most_bytes: int) -> ASGIApp:
    """Refuse bodies of more bytes, before they are read if they say their length, and slow ones."""
    too_large = Refused(413, f"The body is larger than {format_bytes(most_bytes)}.", code="body_too_large")

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > most_bytes:
            return await refusal(too_large)(scope, receive, send)
        read, complete, until = 0, False, asyncio.get_running_loop().time() + _BODY_SECONDS

        async def received() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()  # waits for the client to go away
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise Refused(408, f"The body took longer than {_BODY_SECONDS:.0f} s to arrive.") from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > most_bytes:
                raise too_large
            return message

        await app(scope, received, send)

    return limited


def counted(
    app: FastAPI,
    guarded: ASGIApp,
    *,
    on_answer: Callable[[str, int, float], None],
    on_fault: Callable[[str], None],
) -> ASGIApp:
    """Tell route, status and seconds of each request, and answer 500 where the server is at fault."""
    routes = {getattr(route, "path", "") for route in app.routes}

    async def telling(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await guarded(scope, receive, send)
        status, began = 0, time.perf_counter()

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == _STARTED:
                status = message["status"]
            await send(message)

        try:
            await guarded(scope, receive, sent)
        except Exception as error:
            on_fault(str(unforeseen(error)))
            if status == 0:
                with suppress(OSError):
                    await fault()(scope, receive, sent)
        finally:
            route = scope["path"] if scope["path"] in routes else "other"
            on_answer(route, status or 499, time.perf_counter() - began)

    return telling
