"""A child process that renders one conversation after the other, for a server: the imports are paid once.

The limits are those of :mod:`nirvana_deploy.model.text.chat`. Requests and answers are lines of JSON. A child
that takes too much is ended, and the next conversation gets a new one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import psutil

from nirvana_deploy.base.child import child_environment
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import limit_memory, limit_next_seconds, limits_are_enforced
from nirvana_deploy.model.text.chat import (
    CPU_SECONDS,
    LOOK_SECONDS,
    MEMORY_BYTES,
    RESIDENT_BYTES,
    WALL_SECONDS,
    in_words_of,
    rendered,
    resident_bytes,
)

_HINT = "Ask for a completion of plain text instead."


class Renderer:
    """The chat template of a tokenizer (of transformers), at work; it ends with :meth:`close`."""

    def __init__(self, tokenizer: Any) -> None:
        self._words = in_words_of(tokenizer, True, hint=_HINT)
        self._busy = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    def start(self) -> None:
        """Begin the child's imports."""
        with self._busy:
            self._started()

    def render(self, conversation: Sequence[dict[str, str]]) -> str:
        """A conversation in the words of the template, an answer to follow.

        Waits for others. Raises NirvanaError with one sentence for a template that fails, or asks for more
        than its share of memory, time or text.
        """
        line = json.dumps({"conversations": [list(conversation)], **self._words})
        with self._busy:
            answer = self._answer(line)
        if "problem" in answer:
            raise NirvanaError(f"The chat template was refused: {answer['problem']}.", hint=_HINT)
        return str(answer["texts"][0])

    def close(self) -> None:
        """End the child."""
        with self._busy:
            self._closed = True
            self._end()

    def _answer(self, line: str) -> dict[str, Any]:
        child = self._started()
        assert child.stdin is not None and child.stdout is not None
        try:
            with _looked_after(child):
                child.stdin.write(line.encode() + b"\n")
                child.stdin.flush()
                heard = child.stdout.readline()
        except OSError:  # it ended while it was written to
            heard = b""
        if heard:
            return dict(json.loads(heard))
        self._end()
        return {"problem": f"it takes more than {CPU_SECONDS} s of CPU time, or too much memory"}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise NirvanaError("The server is ending.")
        if self._child is not None and self._child.poll() is not None:
            self._end()
        if self._child is None:
            command = [sys.executable, "-P", "-m", __name__]
            self._child = subprocess.Popen(
                command,
                env=child_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C of a terminal is for the server, which has answers to end
            )
        return self._child

    def _end(self) -> None:
        if self._child is None:
            return
        with self._child as child:
            child.kill()
        self._child = None


@contextmanager
def _looked_after(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the child if it takes too long, or too much memory where the system enforces no limit."""
    done = threading.Event()
    end = time.monotonic() + WALL_SECONDS

    def look() -> None:
        pause_s = WALL_SECONDS if limits_are_enforced() else LOOK_SECONDS
        while not done.wait(pause_s):
            if time.monotonic() >= end or resident_bytes(child.pid) > RESIDENT_BYTES:
                return child.kill()

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()


def answer_lines(asked: IO[bytes], said: IO[bytes]) -> None:
    """Answer each line of ``asked`` under the limits. Changes this process for good."""
    import transformers.utils.chat_template_utils  # noqa: F401  before memory is counted

    limit_memory(psutil.Process().memory_info().vms + MEMORY_BYTES)
    for line in asked:
        limit_next_seconds(CPU_SECONDS)
        said.write(json.dumps(rendered(json.loads(line))).encode() + b"\n")
        said.flush()


if __name__ == "__main__":
    answer_lines(sys.stdin.buffer, sys.stdout.buffer)
