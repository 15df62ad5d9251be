"""One answer: from the tokens of the batch to text that may be sent, and the place that it takes.

Text is sent up to a stop text, and never the beginning of one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.runtime.text import TextPieces
from nirvana_deploy.serve.batch import Asked, Batch, ClosedError, Ending, FullError, Work
from nirvana_deploy.serve.errors import Refused
from nirvana_deploy.serve.metrics import Metrics
from nirvana_deploy.serve.model import ServedModel
from nirvana_deploy.serve.recipe import Serving
from nirvana_deploy.serve.wire import Usage

_LONGEST_RETRY_SECONDS = 120
Made = TypeVar("Made")


class AnswerText:
    """The text of one answer.

    ``tokenizer`` is one of transformers, ``hidden`` are ids without text, ``after`` those of the text that it
    continues, if any.
    """

    def __init__(
        self, tokenizer: Any, *, stops: Sequence[str], hidden: frozenset[int], after: Sequence[int] = ()
    ) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._pieces = TextPieces(tokenizer, self._hear, hidden=hidden, after=after)
        self.stopped = False
        """Whether a stop text came."""

    def add(self, token: int) -> str:
        """Hear one more id; returns what may be sent of the text by now."""
        self._pieces.add(token)
        return self._released(at_end=False)

    def finish(self) -> str:
        """What is left when no token follows."""
        if not self.stopped:
            self._pieces.finish()
        return self._released(at_end=True)

    def _hear(self, text: str) -> None:
        self._held += text

    def _released(self, *, at_end: bool) -> str:
        """All of the text but what may be the beginning of a stop text; none after one."""
        if self.stopped:
            return ""
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        kept = 0 if at_end else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        released, self._held = self._held[:cut], self._held[cut:]
        return released


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)


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
    _open: int = 0
    """Requests for answers that are not done with."""

    def enter(self) -> None:
        """Take one more request; raises Refused where no more may wait, before its prompt is read."""
        if self._open >= self.batch.slots + self.serving.queue:
            raise self.overloaded()
        self._open += 1

    def leave(self) -> None:
        """Be done with a request."""
        self._open -= 1

    def overloaded(self) -> Refused:
        """What the next one is told."""
        slots, waiting = self.batch.slots, max(0, self._open - self.batch.slots)
        return Refused(
            429,
            f"All {slots} slots are taken and {waiting} requests wait; try again later.",
            code="overloaded",
            headers={"Retry-After": str(self._seconds_until_free())},
        )

    def late(self) -> Refused:
        """What is told of an answer that takes too long."""
        seconds = self.serving.request_seconds
        return Refused(504, f"The answer was not finished within {seconds} s.", code="timeout")

    def _seconds_until_free(self) -> int:
        """A guess: half of the mean time of an answer, for as many rounds of slots as wait."""
        count, total = self.metrics.answers_so_far()
        mean_seconds = total / count if count else 1.0
        rounds = self._open / self.batch.slots
        return max(1, min(_LONGEST_RETRY_SECONDS, math.ceil(mean_seconds * rounds / 2)))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.batch)
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="reader")

    async def read(self, read: Callable[..., Made], *given: Any) -> Made:
        """Call ``read`` in the reader's thread."""
        return await asyncio.get_running_loop().run_in_executor(self.reader, read, *given)


class Answer:
    """One answer: from the tokens of the batch to pieces of text. That of a chat continues no text."""

    def __init__(self, service: Service, asked: Asked, stops: list[str], *, chat: bool, began: float) -> None:
        self._service, self._asked, self._began = service, asked, began
        after = () if chat else asked.prompt
        hidden = service.model.stops
        self._text = AnswerText(service.model.tokenizer, stops=stops, hidden=hidden, after=after)
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
            raise service.overloaded() from None
        except ClosedError:
            raise Refused(503, "The server is ending.", headers={"Retry-After": "10"}) from None
        service.metrics.prompt_tokens.inc(len(asked.prompt))

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        read, written = len(self._asked.prompt), self._tokens
        return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    async def pieces(self, *, each_token: bool = False) -> AsyncIterator[str]:
        """The text as it is written; with ``each_token`` also the empty one of a token that adds none.

        Whoever stops listening gives the slot back with :meth:`end`.
        """
        while not isinstance(event := await self._events.get(), str):
            if isinstance(event, ClosedError):
                raise Refused(503, "The server is ending.", headers={"Retry-After": "10"})
            if isinstance(event, Exception):
                raise _of_runtime(event, self._service)
            self._tokens += 1
            self._service.metrics.new_tokens.inc()
            if self._tokens == 1:
                self._service.metrics.first_token.observe(time.perf_counter() - self._began)
            text = self._text.add(event)
            if text or each_token:
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
        self._service.leave()
        self._service.metrics.answer.observe(time.perf_counter() - self._began)


def _of_runtime(error: Exception, service: Service) -> Refused:
    if isinstance(error, NirvanaError):
        return Refused(400, str(error).replace("\n", " "))
    service.on_fault(f"The runtime failed: {type(error).__name__}: {error}")
    return Refused(500, "The runtime failed on this request; the server's log says more.")
