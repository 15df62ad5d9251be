"""The routes: chat completions, completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import peak_rss_bytes
from nirvana_deploy.serve.answer import Answer, Service
from nirvana_deploy.serve.batch import Asked
from nirvana_deploy.serve.errors import Refused, error_object, fault, invalid, refusal
from nirvana_deploy.serve.model import ServedModel
from nirvana_deploy.serve.sampling import Sampling
from nirvana_deploy.serve.wire import (
    ChatRequest,
    CompletionRequest,
    Message,
    Request,
    StreamOptions,
    TextPart,
    Usage,
    Wire,
)

_COMPLETION_TOKENS = 16
"""Of a completion that names no length, as OpenAI's API has it."""
_SSE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """An answer as server-sent events; the slot is given back however it ends, also before it begins."""

    def __init__(self, answer: Answer, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_SSE)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.end()


def make_app(service: Service) -> FastAPI:
    """The routes of ``service``."""
    app = FastAPI(title="nirvana-deploy", docs_url=None, redoc_url=None)
    model = service.model

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(asked: ChatRequest, http: HttpRequest) -> Response:
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise Refused(400, "'max_tokens' and 'max_completion_tokens' say two things.", param="max_tokens")
        most = asked.max_tokens or asked.max_completion_tokens

        async def prompt() -> list[int]:
            return await service.read(model.ids_of_chat, [message.turn for message in asked.messages])

        return await _answered(service, http, asked, prompt, most, chat=True)

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: CompletionRequest, http: HttpRequest) -> Response:
        given: str | list[int] = asked.prompt

        async def prompt() -> list[int]:
            return given if isinstance(given, list) else await service.read(model.ids_of_text, given)

        return await _answered(service, http, asked, prompt, asked.max_tokens, chat=False)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(model)]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _require_model(model, name)
        return _described(model)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        batch = service.batch
        state = {"slots": batch.slots, "active": batch.active, "waiting": batch.waiting}
        status = "ending" if service.closing else "ok"
        return {"status": status, "model": model.name, **state, "peak_rss_bytes": peak_rss_bytes()}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    _say_errors(app, service)
    return app


def _say_errors(app: FastAPI, service: Service) -> None:
    """Answer every refusal with an error object."""
    known = {
        "": sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields}),
        "messages": list(Message.model_fields),
        "stream_options": list(StreamOptions.model_fields),
        "content": list(TextPart.model_fields),
    }

    @app.exception_handler(RequestValidationError)
    async def not_valid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        return refusal(invalid(error, known))

    @app.exception_handler(Exception)
    async def at_fault(_: HttpRequest, error: Exception) -> JSONResponse:
        return fault()  # which guards.counted tells the log of

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> JSONResponse:
        if isinstance(error, Refused):
            return refusal(error)
        if error.status_code == 404:
            routes = ", ".join(sorted(path for route in app.routes if (path := _path(route))))
            return refusal(Refused(404, f"{http.url.path} is not served; there are {routes}."))
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            said = f"{http.url.path} takes {allowed}, not {http.method}."
            return refusal(Refused(405, said, headers=error.headers))
        if error.status_code == 400:
            return refusal(Refused(400, "The body cannot be read as JSON."))
        return refusal(error)


def _path(route: Any) -> str | None:
    path = getattr(route, "path", "")
    return path if path.startswith(("/v1", "/health", "/metrics")) and "{" not in path else None


async def _answered(
    service: Service,
    http: HttpRequest,
    asked: Request,
    prompt: Callable[[], Any],
    most: int | None,
    *,
    chat: bool,
) -> Response:
    """Read the prompt, have the answer written, and send it in one piece or as a stream."""
    began = time.perf_counter()
    until = asyncio.get_running_loop().time() + service.serving.request_seconds
    if asked.model is not None:
        _require_model(service.model, asked.model)
    service.enter()
    try:
        answer = await _begun(service, asked, prompt, most, chat=chat, began=began)
    except BaseException:
        service.leave()
        raise
    wire = Wire(service.model.name, chat=chat)
    if asked.stream:
        events = _events(service, answer, wire, asked, until=until)
        return EventStream(answer, events)
    writing = asyncio.ensure_future(_whole(answer, until, service))
    leaving = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(wire.whole(writing.result(), answer.ending, answer.usage))
    finally:
        writing.cancel()
        leaving.cancel()
        answer.end()


async def _begun(
    service: Service,
    asked: Request,
    prompt: Callable[[], Any],
    most: int | None,
    *,
    chat: bool,
    began: float,
) -> Answer:
    """Read the prompt and have its answer written; raises Refused."""
    ids = await _ids(prompt, "messages" if chat else "prompt")
    unsaid = service.serving.max_new_tokens if chat else _COMPLETION_TOKENS
    length = _length(service, ids, most, unsaid=unsaid)
    _require_known(service.model, ids)
    sampling = _sampling(service.model.sampling, asked)
    stops = frozenset[int]() if asked.ignore_eos else service.model.stops
    wanted = Asked(prompt=ids, max_new_tokens=length, stops=stops, sampling=sampling)
    return Answer(service, wanted, asked.stop or [], chat=chat, began=began)


async def _whole(answer: Answer, until: float, service: Service) -> str:
    try:
        async with asyncio.timeout_at(until):
            return "".join([piece async for piece in answer.pieces()])
    except TimeoutError:
        raise service.late() from None


async def _left(http: HttpRequest) -> None:
    """Return when the client has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(
    service: Service, answer: Answer, wire: Wire, asked: Request, *, until: float
) -> AsyncIterator[str]:
    """An answer as server-sent events; what goes wrong after its first is one as well."""

    def counts() -> Usage | None:
        return answer.usage if asked.counts_each else None

    try:
        yield _event(wire.piece("", first=True, usage=counts()))
        pieces = answer.pieces(each_token=asked.counts_each)
        while True:
            async with asyncio.timeout_at(until):
                text = await anext(pieces, None)
            if text is None:
                break
            yield _event(wire.piece(text, usage=counts()))
        yield _event(wire.piece("", ending=answer.ending, usage=counts()))
        if asked.with_usage:
            yield _event(wire.counts(answer.usage))
    except TimeoutError:
        late = service.late()
        yield _event(error_object(late.status_code, str(late.detail), code=late.code))
    except Refused as error:
        yield _event(error_object(error.status_code, str(error.detail), code=error.code))
    yield "data: [DONE]\n\n"


def _event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _ids(prompt: Callable[[], Any], param: str) -> list[int]:
    try:
        ids: list[int] = await prompt()
    except NirvanaError as error:
        raise Refused(400, str(error).replace("\n", " "), param=param) from error
    except (TypeError, UnicodeError) as error:
        raise Refused(400, "The text holds half a character (a lone surrogate).", param=param) from error
    if not ids:
        raise Refused(400, "The prompt has no tokens.", param=param)
    return ids


def _length(service: Service, ids: list[int], most: int | None, *, unsaid: int) -> int:
    """How long an answer may become; raises Refused where prompt or answer find no room.

    Where the request does not say ``most``, it is ``unsaid``, or what server and context allow.
    """
    context, allowed = service.model.context_tokens, service.serving.max_prompt_tokens
    if allowed is not None and len(ids) > allowed:
        message = f"The prompt has {len(ids):,} tokens; this server takes at most {allowed:,}."
        raise Refused(400, message, code="context_length_exceeded")
    longest = service.serving.max_new_tokens
    if most is not None and most > longest:
        message = f"{most:,} tokens are asked for; this server writes at most {longest:,} per answer."
        raise Refused(400, message, param="max_tokens")
    unsaid = min(unsaid, longest)
    if context is None:
        return most or unsaid
    room = context - len(ids)
    if room < (most or 1):
        message = (
            f"The model's context is {context:,} tokens; the prompt has {len(ids):,} and {most or 1:,} more "
            "are asked for."
        )
        raise Refused(400, message, code="context_length_exceeded")
    return most or min(unsaid, room)


def _sampling(default: Sampling, asked: Request) -> Sampling:
    """What the request says, and the model's settings where it says nothing."""
    given = {
        name: value
        for name in ("top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
        if (value := getattr(asked, name)) is not None
    }
    if asked.top_k is not None:
        given["top_k"] = max(asked.top_k, 0)
    if asked.temperature is not None:
        given["temperature"] = float(asked.temperature)
    elif default.temperature == 0 and (given.get("top_p", 1) < 1 or given.get("top_k", 0) > 0):
        given["temperature"] = 1.0  # who limits a draw wants one
    return replace(default, **given)


def _require_model(model: ServedModel, name: str) -> None:
    if name != model.name:
        raise Refused(
            404,
            f"The model {name[:200]!r} is not served; there is {model.name!r}.",
            param="model",
            code="model_not_found",
        )


def _require_known(model: ServedModel, ids: list[int]) -> None:
    vocabulary = model.runner.vocab_size
    if (largest := max(ids)) >= vocabulary:
        message = f"Token {largest} is not in the vocabulary of {vocabulary:,}."
        raise Refused(400, message, param="prompt")


def _described(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "nirvana-deploy",
        "context_tokens": model.context_tokens,
        "vocab_size": model.runner.vocab_size,
    }
