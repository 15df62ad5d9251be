"""Answers written together: one thread that reads prompts into a batch and writes a token of each at a time.

A prompt joins the batch as soon as a slot is free, an answer leaves it when it ends; nobody waits for the
longest. A runner whose states cannot be put together (``Batches``) writes one answer at a time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.runtime.runner import Batches, Runner
from nirvana_deploy.serve.sampling import Sampler, Sampling

Ending = Literal["stop", "length"]
"""A stop token came, or the answer has the length that was asked for."""
Heard = Callable[["int | Ending | Exception"], None]
"""Receives each token, then how the answer ended, or why it failed; called by the batch's thread."""


class FullError(Exception):
    """Every slot is taken and no more requests may wait."""


class ClosedError(Exception):
    """The server is ending, or the answer was given up."""


@dataclass(frozen=True)
class Asked:
    """One answer to be written."""

    prompt: Sequence[int]
    max_new_tokens: int
    stops: frozenset[int]
    sampling: Sampling


class Work:
    """One answer on its way."""

    def __init__(self, asked: Asked, heard: Heard) -> None:
        self.asked, self.heard = asked, heard
        self.sampler = Sampler(asked.sampling, asked.prompt)
        self.cancelled = False
        self.last_token = 0
        self._written = 0

    def goes_on(self, logits: NDArray[np.float32]) -> bool:
        """Write one more token by logits [V]; whether another one is to follow."""
        self.last_token = self.sampler.next(logits)
        self._written += 1
        self.heard(self.last_token)
        if self.last_token in self.asked.stops:
            self.heard("stop")
        elif self._written == self.asked.max_new_tokens:
            self.heard("length")
        else:
            return True
        return False


class Batch:
    """The thread that owns a runner; it ends with :meth:`close`."""

    def __init__(self, runner: Runner, *, slots: int, queue: int) -> None:
        self._runner = runner
        self._joins: Batches | None = runner if isinstance(runner, Batches) else None
        self.slots = slots if self._joins is not None else 1
        self._queue = queue
        self._changed = threading.Condition()
        self._waiting: deque[Work] = deque()
        self._rows: list[Work] = []
        self._state: Any = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Answers that are being written."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def submit(self, asked: Asked, heard: Heard) -> Work:
        """Have an answer written; raises FullError, and ClosedError once the batch is closed."""
        work = Work(asked, heard)
        with self._changed:
            if self._closing:
                raise ClosedError
            if len(self._waiting) >= self._queue + max(0, self.slots - len(self._rows)):
                raise FullError
            self._waiting.append(work)
            self._changed.notify()
        return work

    def cancel(self, work: Work) -> None:
        """Give an answer up: its place in the queue is free at once, its slot after the token at work.

        A prompt that is being read is read to its end.
        """
        with self._changed:
            work.cancelled = True
            if work in self._waiting:
                self._waiting.remove(work)

    def close(self) -> None:
        """End the thread; what is not finished fails with ClosedError.

        Waits for the step at work: a prompt that is being read is read to its end.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (new := self._next()) is not None or self._rows or not self._closing:
            self._leave([not work.cancelled for work in self._rows])
            if new is not None:
                self._guarded(self._read, new, [new])
            if self._rows:
                self._guarded(self._write, None, list(self._rows))

    def _guarded(self, step: Callable[[Any], None], argument: Any, working: Sequence[Work]) -> None:
        """Take a step for ``working``; where the runtime fails, they fail, and the next may succeed."""
        try:
            step(argument)
        except Exception as error:
            self._leave([work not in working for work in self._rows])
            for work in working:
                work.heard(error)

    def _next(self) -> Work | None:
        """The prompt to read next, if there is a slot; waits while there is nothing at all to do."""
        with self._changed:
            while not (self._waiting or self._rows or self._closing):
                self._changed.wait()
            if self._closing:
                for work in (*self._rows, *self._waiting):
                    work.cancelled = True
                    work.heard(ClosedError())
                self._waiting.clear()
            return self._waiting.popleft() if self._waiting and len(self._rows) < self.slots else None

    def _read(self, work: Work) -> None:
        """Prefill one prompt, write its first token, and let it join the batch."""
        logits, state = self._runner.prefill(np.array([work.asked.prompt], dtype=np.int64))
        if work.cancelled or not work.goes_on(logits[0, -1]):
            return
        if self._joins is not None and self._rows:
            state = self._joins.joined(self._state, state)
        self._rows, self._state = [*self._rows, work], state

    def _write(self, _: None) -> None:
        """Write the next token of every answer."""
        tokens = np.array([[work.last_token] for work in self._rows], dtype=np.int64)
        logits, self._state = self._runner.decode(tokens, self._state)
        self._leave([_goes_on(work, logits[row, -1]) for row, work in enumerate(self._rows)])

    def _leave(self, stays: Sequence[bool]) -> None:
        """Drop the rows that do not stay."""
        if all(stays):
            return
        rows = [row for row, kept in enumerate(stays) if kept]
        self._rows = [self._rows[row] for row in rows]
        self._state = self._joins.kept(self._state, rows) if self._joins is not None and rows else None


def _goes_on(work: Work, logits: NDArray[np.float32]) -> bool:
    """Write a token of one answer; where that fails, it fails alone."""
    try:
        return work.goes_on(logits)
    except Exception as error:
        work.heard(error)
        return False
