"""The routes: chat completions, completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.serve.answer import AnswerText
from nirvana_deploy.serve.batch import Asked, Batch, ClosedError, Ending, FullError, Work
from nirvana_deploy.serve.errors import Refused, error_object, invalid, refusal
from nirvana_deploy.serve.metrics import Metrics
from nirvana_deploy.serve.model import ServedModel
from nirvana_deploy.serve.recipe import Serving
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
Made = TypeVar("Made")


@dataclass
class Service:
    """What the routes share."""

    model: ServedModel
    batch: Batch
    serving: Serving
    on_fault: Callable[[str], None]
    metrics: Metrics = field(init=False)
    reader: ThreadPoolExecutor = field(init=False)
    """Reads prompts one after the other, beside the loop that answers."""
    closing: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.batch)
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="reader")

    async def read(self, read: Callable[..., Made], *given: Any) -> Made:
        """Call ``read`` in the reader's thread."""
        return await asyncio.get_running_loop().run_in_executor(self.reader, read, *given)


class Answer:
    """One answer: from the tokens of the batch to pieces of text."""

    def __init__(self, service: Service, asked: Asked, stops: list[str], *, began: float) -> None:
        self._service, self._asked, self._began = service, asked, began
        self._text = AnswerText(service.model.tokenizer, stops=stops, hidden=asked.stops)
        self._events: asyncio.Queue[int | Ending | Exception] = asyncio.Queue()
        self._tokens = 0
        self.ending: Ending = "stop"
        loop = asyncio.get_running_loop()

        def heard(event: int | Ending | Exception) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits for an answer
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        try:
            self._work: Work = service.batch.submit(asked, heard)
        except FullError:
            waiting = service.batch.waiting
            raise Refused(
                429,
                f"All {service.batch.slots} slots are taken and {waiting} requests wait; try again later.",
                code="overloaded",
                headers={"Retry-After": str(_seconds_until_free(service))},
            ) from None
        except ClosedError:
            raise Refused(503, "The server is ending.", headers={"Retry-After": "10"}) from None
        service.metrics.prompt_tokens.inc(len(asked.prompt))

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        read, written = len(self._asked.prompt), self._tokens
        return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it is written. Whoever stops listening gives the slot back with :meth:`end`."""
        while not isinstance(event := await self._events.get(), str):
            if isinstance(event, ClosedError):
                raise Refused(503, "The server is ending.", headers={"Retry-After": "10"})
            if isinstance(event, Exception):
                raise _of_runtime(event, self._service)
            self._tokens += 1
            self._service.metrics.new_tokens.inc()
            if self._tokens == 1:
                self._service.metrics.first_token.observe(time.perf_counter() - self._began)
            if text := self._text.add(event):
                yield text
            if self._text.stopped:
                return
        self.ending = event
        if text := self._text.finish():
            yield text
        if self._text.stopped:
            self.ending = "stop"

    def end(self) -> None:
        """Give the slot back, if it is not free by now."""
        self._service.batch.cancel(self._work)
        self._service.metrics.answer.observe(time.perf_counter() - self._began)


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

        return await _answered(
            service, http, asked, prompt, asked.max_tokens or _COMPLETION_TOKENS, chat=False
        )

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
        return {"status": "ending" if service.closing else "ok", "model": model.name, **state}

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
    wanted = Asked(
        prompt=(ids := await _ids(prompt, "messages" if chat else "prompt")),
        max_new_tokens=_length(service, ids, most),
        stops=service.model.stops,
        sampling=_sampling(service.model.sampling, asked),
    )
    _require_known(service.model, ids)
    answer = Answer(service, wanted, asked.stop or [], began=began)
    wire = Wire(service.model.name, chat=chat)
    if asked.stream:
        events = _events(service, answer, wire, with_usage=asked.with_usage, until=until)
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


async def _whole(answer: Answer, until: float, service: Service) -> str:
    try:
        async with asyncio.timeout_at(until):
            return "".join([piece async for piece in answer.pieces()])
    except TimeoutError:
        raise _late(service) from None


async def _left(http: HttpRequest) -> None:
    """Return when the client has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(
    service: Service, answer: Answer, wire: Wire, *, with_usage: bool, until: float
) -> AsyncIterator[str]:
    """An answer as server-sent events; what goes wrong after its first is one as well."""
    try:
        yield _event(wire.piece("", first=True))
        pieces = answer.pieces()
        while True:
            async with asyncio.timeout_at(until):
                text = await anext(pieces, None)
            if text is None:
                break
            yield _event(wire.piece(text))
        yield _event(wire.piece("", ending=answer.ending))
        if with_usage:
            yield _event(wire.counts(answer.usage))
    except TimeoutError:
        late = _late(service)
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


def _length(service: Service, ids: list[int], most: int | None) -> int:
    """How long an answer may become; raises Refused where prompt or answer find no room."""
    context, allowed = service.model.context_tokens, service.serving.max_prompt_tokens
    if allowed is not None and len(ids) > allowed:
        message = f"The prompt has {len(ids):,} tokens; this server takes at most {allowed:,}."
        raise Refused(400, message, code="context_length_exceeded")
    longest = service.serving.max_new_tokens
    if most is not None and most > longest:
        message = f"{most:,} tokens are asked for; this server writes at most {longest:,} per answer."
        raise Refused(400, message, param="max_tokens")
    if context is None:
        return most or longest
    room = context - len(ids)
    if room < (most or 1):
        message = (
            f"The model's context is {context:,} tokens; the prompt has {len(ids):,} and {most or 1:,} more "
            "are asked for."
        )
        raise Refused(400, message, code="context_length_exceeded")
    return most or min(longest, room)


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
    }


def _late(service: Service) -> Refused:
    seconds = service.serving.request_seconds
    return Refused(504, f"The answer was not finished within {seconds} s.", code="timeout")


def _of_runtime(error: Exception, service: Service) -> Refused:
    if isinstance(error, NirvanaError):
        return Refused(400, str(error).replace("\n", " "))
    service.on_fault(f"The runtime failed: {type(error).__name__}: {error}")
    return Refused(500, "The runtime failed on this request; the server's log says more.")


def _seconds_until_free(service: Service) -> int:
    """A guess: the mean time of an answer, for as many rounds of slots as wait."""
    count, total = service.metrics.answers_so_far()
    mean = total / count if count else 1.0
    return max(1, min(120, math.ceil(mean * (1 + service.batch.waiting / service.batch.slots) / 2)))
