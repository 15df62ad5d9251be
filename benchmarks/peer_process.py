"""The parent's end of a process that runs one model (peer_worker.py, peer_llama_cpp.mjs)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.measure.worker import RoundSample

HERE = Path(__file__).resolve().parent
_TAIL_BYTES = 4000


class PeerProcess:
    """A context manager that ends the process with its block.

    ``command`` is what starts it, kind, path and threads included. Raises NirvanaError with its last words
    where it does not load or dies, and where it gives no answer within ``limit_s``: it is ended then.
    """

    about: dict[str, str]
    """Versions, and settings that the runtime chose."""
    peak_rss_bytes: int
    """As of the last answer."""

    def __init__(self, command: list[str], *, threads: int, limit_s: float = 3600) -> None:
        self._limit_s, self._late = limit_s, False
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def __enter__(self) -> PeerProcess:
        try:
            self.about = self._answer()["about"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def measure(self, tokens: NDArray[np.int64], *, new_tokens: int) -> RoundSample:
        """Time one greedy request of tokens [1, T]; of prefill only the time to the first token is known."""
        found = self._ask({"tokens": tokens[0].tolist(), "new_tokens": new_tokens})
        return RoundSample(
            prefill_ms=found["ttft_ms"], ttft_ms=found["ttft_ms"], itl_ms=tuple(found["itl_ms"])
        )

    def logits(self, windows: NDArray[np.int64], file: Path) -> NDArray[np.float32]:
        """Logits [M, T - 1, V] that predict the last T - 1 tokens of windows [M, T], mapped from ``file``."""
        self._ask({"windows": windows.tolist(), "file": str(file.absolute())})
        rows, positions = windows.shape
        found: NDArray[np.float32] = np.fromfile(file, dtype=np.float32).reshape(rows, positions - 1, -1)
        return found

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise NirvanaError(self._last_words()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        limit = threading.Timer(self._limit_s, self._too_late)
        limit.start()
        try:
            line = self._process.stdout.readline()
        finally:
            limit.cancel()
        if not line:
            raise NirvanaError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        self.peak_rss_bytes = answer["peak_rss_bytes"]
        return answer

    def _too_late(self) -> None:
        self._late = True
        self._process.kill()

    def _last_words(self) -> str:
        code = self._process.wait()
        if self._late:
            return f"no answer within {self._limit_s:g} s"
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _TAIL_BYTES))
        return last_words(self._stderr.read().decode(errors="replace"))


def last_words(output: str) -> str:
    """The last line that a failed program wrote, for a table: without folders, of at most 160 letters."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = lines[-1] if lines else "it ended without a word"
    return re.sub(r"(?:/[^\s/'\"]+)+/", "", said).replace("|", "/")[:160]
