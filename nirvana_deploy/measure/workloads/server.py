"""A server of one model, in a process of its own, and clients that keep the time of what it answers.

The child is ``nirvana-deploy serve``, asked over HTTP on this machine as anybody would ask it. It ends when
its input does, also when the parent was killed.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base import child
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.measure.rounds.processes import Model
from nirvana_deploy.measure.workloads.named import NamedWorkload

_PROGRAM = ("-P", "-m", child.__name__, "serve")
_QUIET = ("--port", "0", "--json", "-q")
_GREEDY = {"temperature": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
_MOST_BODY_BYTES, _MOST_ID_BYTES = 4096, 16
"""Of a request without its prompt, and of each token's id."""
_LONGEST_SECONDS = 7 * 24 * 3600
_STREAMED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@dataclass(frozen=True)
class ServedSample:
    """One streamed answer, as its client saw it come."""

    ttft_ms: float
    """From sending the request to the event of the first token."""
    itl_ms: tuple[float, ...]
    """Gaps between the events of consecutive tokens; 0 for tokens that share one."""

    @property
    def e2e_ms(self) -> float:
        """From sending the request to the event of the last token."""
        return self.ttft_ms + sum(self.itl_ms)

    @property
    def tpot_ms(self) -> float:
        """(end to end - TTFT) / (new tokens - 1)."""
        return sum(self.itl_ms) / len(self.itl_ms)


@contextmanager
def listening(
    models: Sequence[Model],
    workload: NamedWorkload,
    *,
    threads: int | None,
    lost: MutableMapping[str, NirvanaError],
    progress: Progress = SILENT,
) -> Iterator[dict[str, ServerProcess]]:
    """A server for each model, by name, with a slot for each client of ``workload`` and no shorter limits.

    One that does not come to listen goes into ``lost`` with its error.
    """
    longest = workload.longest()
    options = ["--slots", workload.at_a_time, "--queue", workload.at_a_time]
    options += ["--max-new-tokens", longest.new_tokens, "--request-seconds", _LONGEST_SECONDS]
    options += ["--max-body", f"{_MOST_BODY_BYTES + _MOST_ID_BYTES * longest.prompt_tokens}B"]
    options += ["--threads", threads] if threads is not None else []
    with ExitStack() as stack:
        servers = {}
        for model in models:
            progress.note(f"Starting the server of {model.name}")
            runtime = ["--runtime", model.runtime] if model.runtime is not None else []
            server = ServerProcess(model.name, model.path, [str(word) for word in (*options, *runtime)])
            try:
                servers[model.name] = stack.enter_context(server)
            except NirvanaError as error:
                lost[model.name] = error
        yield servers


class ServerProcess:
    """A server of an ONNX folder or an output folder: a context manager that ends it with its block.

    Raises NirvanaError where it does not come to listen, and where it dies; its last words are in the
    message.
    """

    url: str
    """Where clients' base URL points to."""
    model: str
    """By which clients know it."""
    slots: int
    """Answers that it writes at a time."""
    load_ms: float
    """From the start of the process until it listens."""
    exit_code: int | None = None
    """Once it has ended: 0, unless it failed or was killed."""

    def __init__(self, name: str, path: Path, options: Iterable[str] = ()) -> None:
        self._name = name
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in _end
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, *_PROGRAM, str(path.absolute()), *_QUIET, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=child.child_environment(),
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def __enter__(self) -> ServerProcess:
        try:
            ready = self._ready()
        except BaseException:
            self._end(kill=True)
            raise
        self.load_ms = 1e3 * (time.perf_counter() - self._began)
        self.url, self.model, self.slots = ready["url"], ready["model"], ready["slots"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kill=error is not None)

    def health(self) -> dict[str, Any]:
        """What the server says of itself now."""
        return self._get("/health")

    @property
    def vocab_size(self) -> int:
        """V: ids below it may stand in a prompt."""
        (found,) = self._get("/v1/models")["data"]
        return int(found["vocab_size"])

    @property
    def peak_rss_bytes(self) -> int:
        """The most resident memory since the process began."""
        return int(self.health()["peak_rss_bytes"])

    def answer_all(
        self, asked: Sequence[tuple[NDArray[np.int64], int]], *, clients: int
    ) -> tuple[list[ServedSample], float]:
        """Answer each (prompt [T], new tokens) of ``asked``; also returns the seconds that all took.

        Every one of ``clients`` sends the next request as soon as its own is answered.
        """
        start = time.perf_counter()
        try:
            with ThreadPoolExecutor(clients, thread_name_prefix="client") as pool:
                try:
                    samples = list(pool.map(lambda one: self.answer(one[0], new_tokens=one[1]), asked))
                except BaseException:
                    self._process.kill()  # clients that still wait hear of it, and their threads end
                    raise
        except (OSError, http.client.HTTPException):
            raise self._died() from None
        return samples, time.perf_counter() - start

    def answer(self, prompt: NDArray[np.int64], *, new_tokens: int) -> ServedSample:
        """Have ``new_tokens`` (at least 2) greedy tokens written behind a prompt [T], and time each.

        Raises NirvanaError for an answer that is refused, or has another length.
        """
        length = {"max_tokens": new_tokens, "ignore_eos": True}
        body = json.dumps({"prompt": prompt.tolist(), **length, **_GREEDY, **_STREAMED}).encode()
        connection = self._connection()
        try:
            connection.connect()
            start = time.perf_counter()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise self._refused(json.loads(response.read()))
            stamps = self._stamps(response)
        finally:
            connection.close()
        if len(stamps) != new_tokens:
            raise NirvanaError(f"{self._name}: {len(stamps)} of {new_tokens} tokens came.")
        gaps = tuple(1e3 * float(gap) for gap in np.diff(stamps))
        return ServedSample(ttft_ms=1e3 * (stamps[0] - start), itl_ms=gaps)

    def _stamps(self, response: http.client.HTTPResponse) -> list[float]:
        """When each token came; an event says how many there are by now."""
        stamps: list[float] = []
        for line in response:
            now = time.perf_counter()
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise self._refused(event)
                stamps += [now] * (event["usage"]["completion_tokens"] - len(stamps))
        return stamps

    def _refused(self, answer: dict[str, Any]) -> NirvanaError:
        return NirvanaError(f"{self._name}: the server refused a request: {answer['error']['message']}")

    def _get(self, path: str) -> dict[str, Any]:
        connection = self._connection()
        try:
            connection.request("GET", path)
            found: dict[str, Any] = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException):
            raise self._died() from None
        finally:
            connection.close()
        return found

    def _connection(self) -> http.client.HTTPConnection:
        place = urlsplit(self.url)
        return http.client.HTTPConnection(str(place.hostname), place.port)

    def _ready(self) -> dict[str, Any]:
        """The object that it prints when it listens."""
        assert self._process.stdout is not None
        said = b""
        while not said.endswith(b"}\n"):
            line = self._process.stdout.readline()
            if not line:
                raise self._died()
            said += line
        ready: dict[str, Any] = json.loads(said)
        return ready

    def _died(self) -> NirvanaError:
        return child.died(self._process, self._stderr, what=f"The server of {self._name!r}")

    def _end(self, *, kill: bool) -> None:
        """End the process: by the end of its input, upon which it finishes what is open, or at once."""
        if kill:
            self._process.kill()
        self._process.communicate()
        self._stderr.close()
        self.exit_code = self._process.returncode
