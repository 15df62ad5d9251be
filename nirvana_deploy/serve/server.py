"""A server's life: socket, model, routes; then it answers until it is told to end, and drains."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from nirvana_deploy.base.child import KEY_VARIABLE
from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import require_file
from nirvana_deploy.serve.recipe import Serving

_EXTRA = (("fastapi", "fastapi"), ("uvicorn", "uvicorn"), ("prometheus_client", "prometheus-client"))
"""Modules that the extra ``serve`` installs, and their packages."""
_BACKLOG = 2048
_LOOK_SECONDS = 0.2
_LONGEST_KEY = 4096
_LAST_PORT = 65535


@dataclass(frozen=True)
class Served:
    """A server at work, or what it did."""

    url: str
    """Where clients' base URL points to."""
    model: str
    slots: int
    context_tokens: int | None
    needs_key: bool
    answered: int = 0
    """Requests for answers that were fulfilled."""

    def __repr__(self) -> str:
        return f"Served({self.model!r} on {self.url}, {self.slots} slots, {self.answered} answered)"


@contextmanager
def serving(
    folder: Path,
    *,
    name: str,
    options: Serving,
    runtime: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Iterator[Server]:
    """Serve the ONNX ``folder`` as the model ``name`` inside the block; its end drains.

    Raises NirvanaError for a missing extra, an address that is not free, and a folder that cannot be served.
    """
    require_extra()
    from nirvana_deploy.serve.answer import Service
    from nirvana_deploy.serve.batch import Batch
    from nirvana_deploy.serve.model import opened

    key = read_key(options.api_key_file)
    with _bound(options.host, options.port) as sock:
        if not _is_local(sock) and key is None:
            progress.note(
                f"Anybody who reaches {options.host} can use this server: no bearer token was given. "
                f"Set {KEY_VARIABLE} or --api-key-file."
            )
        known_as = (options.model_name or name).encode(errors="replace").decode()
        with opened(folder, name=known_as, runtime=runtime, threads=threads) as model:
            batch = Batch(model.runner, slots=options.slots, queue=options.queue)
            service = Service(model, batch, options, on_fault=progress.note)
            try:
                server = Server(service, sock, key=key, progress=progress)
                try:
                    yield server
                finally:
                    server.end()
            finally:
                batch.close()
                service.reader.shutdown(cancel_futures=True)


class Server:
    """uvicorn in a thread of its own, so that signals stay with the main thread."""

    def __init__(self, service: Any, sock: socket.socket, *, key: str | None, progress: Progress) -> None:
        import uvicorn

        from nirvana_deploy.serve.app import make_app
        from nirvana_deploy.serve.connections import connection_protocol
        from nirvana_deploy.serve.guards import body_limited, counted, key_checked

        self._service, self._key, self._progress = service, key, progress
        self._answered = 0
        options: Serving = service.serving
        app = make_app(service)
        guarded = key_checked(body_limited(app, options.max_body), key)
        protocol: Any = connection_protocol(
            requests=service.batch.slots + options.queue,
            request_seconds=options.request_seconds + options.drain_seconds,
        )
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                counted(app, guarded, on_answer=self._count, on_fault=progress.note),
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=max(options.drain_seconds, 1),
            )
        )
        host, port = sock.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        _listen(sock, host, port)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(sock,), name="server")
        self._thread.start()
        while not self._uvicorn.started and self._thread.is_alive():
            self._thread.join(0.01)
        if not self._uvicorn.started:
            self.end()

    @property
    def served(self) -> Served:
        """What it serves, and how much it did."""
        model = self._service.model
        return Served(
            url=self.url,
            model=model.name,
            slots=self._service.batch.slots,
            context_tokens=model.context_tokens,
            needs_key=self._key is not None,
            answered=self._answered,
        )

    def wait(self, on_ready: Callable[[Served], None] | None = None) -> None:
        """Return when SIGINT or SIGTERM comes; a second one ends at once what is open.

        A prompt that is being read is read to its end. ``on_ready`` hears when these signals are heard.
        """
        tell = on_ready or (lambda served: None)
        if threading.current_thread() is not threading.main_thread():
            tell(self.served)
            return self._thread.join()
        heard: list[int] = []
        # the main thread may hold an Event's lock when the handler runs in it; this put may interrupt a get
        told: SimpleQueue[int] = SimpleQueue()

        def handle(number: int, frame: FrameType | None) -> None:
            heard.append(number)
            told.put(number)
            if len(heard) > 1:
                self._uvicorn.force_exit = True
                self._service.batch.close()

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            tell(self.served)
            while not heard and self._thread.is_alive():
                with suppress(Empty):
                    told.get(timeout=_LOOK_SECONDS)
            if self._thread.is_alive():
                count = self._service.batch.active + self._service.batch.waiting
                left = f"; {count} answers are open (once more to end at once)" if count else ""
                self._progress.note(f"Ending{left}.")
            self.end()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def end(self) -> None:
        """Take no more connections, let open answers end, and stop; raises what the server failed with."""
        self._service.closing = True
        self._uvicorn.should_exit = True
        while self._thread.is_alive():  # a join without timeout hears no signal
            self._thread.join(_LOOK_SECONDS)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _run(self, sock: socket.socket) -> None:
        try:
            asyncio.run(self._uvicorn.serve(sockets=[sock]))
        except BaseException as error:
            self._failure = error

    def _count(self, route: str, status: int, seconds: float) -> None:
        self._service.metrics.requests.labels(route, str(status)).inc()
        self._answered += route.endswith("/completions") and status == 200
        self._progress.detail(f"{route} {status}, {1e3 * seconds:.0f} ms")


def read_key(file: Path | None) -> str | None:
    """The bearer token of a file, else of the environment; None for none. It is never shown."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        where = f"The variable {KEY_VARIABLE}"
    else:
        where = f"--api-key-file {file}"
        require_file(file)
        try:
            with file.open("rb") as opened:
                key = opened.read(_LONGEST_KEY + 1).decode("ascii").strip()
        except UnicodeDecodeError:
            raise NirvanaError(f"{where} holds characters that no header can carry.") from None
        except OSError as error:
            raise NirvanaError(f"{where} cannot be read: {error.strerror}.") from error
        if not key:
            raise NirvanaError(f"{where} is empty.", hint="Write a long random text into it.")
    if key and not (key.isascii() and key.isprintable() and " " not in key and len(key) <= _LONGEST_KEY):
        raise NirvanaError(
            f"{where} must hold one line of at most {_LONGEST_KEY:,} ASCII characters without spaces."
        )
    return key or None


def require_extra() -> None:
    """Raise MissingExtraError, with the pip command, where a package of the extra ``serve`` is missing."""
    for module, package in _EXTRA:
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise MissingExtraError("Serving a model", package=package, extra="serve") from None


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to the address; raises NirvanaError for one that is not there or not free."""
    if port > _LAST_PORT:
        raise NirvanaError(f"Port {port} is beyond the last one, {_LAST_PORT}.")
    by_name = host == "localhost"  # no other name is looked up: a server knows its own addresses
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=0 if by_name else socket.AI_NUMERICHOST
        )[0]
    except (OSError, ValueError) as error:
        raise NirvanaError(
            f"--host takes an IP address of this machine, or localhost; got {host!r}.",
            hint="127.0.0.1 is for this machine alone, 0.0.0.0 for all that reach it.",
        ) from error
    sock = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # a port of a server that has just ended is free
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except (OSError, OverflowError) as error:
            raise _not_free(host, port, error) from error
        yield sock
    finally:
        with suppress(OSError):
            sock.close()


def _listen(sock: socket.socket, host: str, port: int) -> None:
    """Listen; raises NirvanaError where another server, bound to the address as well, did so first."""
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        raise _not_free(host, port, error) from error


def _not_free(host: str, port: int, error: Exception) -> NirvanaError:
    said = getattr(error, "strerror", None) or str(error)
    return NirvanaError(
        f"Port {port} of {host} cannot be listened on: {said}.",
        hint="Name another port (--port 0 takes a free one), or end what listens there.",
    )


def _is_local(sock: socket.socket) -> bool:
    host = str(sock.getsockname()[0])
    return host == "::1" or host.startswith("127.")


def serve_onnx_folder(
    folder: Path,
    *,
    name: str,
    options: Serving,
    runtime: str | None = None,
    threads: int | None = None,
    on_ready: Callable[[Served], None] | None = None,
    progress: Progress = SILENT,
) -> Served:
    """Serve the ONNX ``folder`` until SIGINT or SIGTERM; ``on_ready`` hears when it listens."""
    with serving(
        folder, name=name, options=options, runtime=runtime, threads=threads, progress=progress
    ) as server:
        server.wait(on_ready)
    return server.served
