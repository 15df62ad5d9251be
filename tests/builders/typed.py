"""Command lines of pages, typed in this process, where workers are threads: nothing is imported anew."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import pytest
from click.testing import CliRunner

from nirvana_deploy.cli.main import commands
from nirvana_deploy.measure import worker

PROGRAM = "nirvana-deploy"
_PAUSE_S, _PATIENCE = 0.05, 2400
"""Between two requests to a server that does not listen yet, and how many are made."""


def typed(line: str, where: Path, variables: dict[str, str]) -> str:
    """Type a line that begins with the program's name in the folder ``where``; returns what it printed.

    Its output goes where ``>`` or ``|`` says. ``serve`` answers one request, and is then told to end.
    """
    program, *words = shlex.split(line, comments=True)
    assert program == PROGRAM, line
    end = next((at for at, word in enumerate(words) if word in {">", "|"}), len(words))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(where)
        for name, value in variables.items():
            patched.setenv(name, value)
        asked, rest = words[:end], words[end:]
        port = ["--port", str(_free_port())] if words[0] == "serve" else []
        with _client(port[1], variables) if port else nullcontext():
            done = CliRunner().invoke(commands, [*asked, *port])
        if done.exit_code:
            raise AssertionError(f"{line}\n{done.output[-2000:]}") from done.exception
        match rest:
            case [">", file]:
                Path(file).write_text(done.stdout, encoding="utf-8")
            case ["|", *reader]:
                read = subprocess.run(reader, input=done.stdout, capture_output=True, text=True, check=True)
                return read.stdout
    return done.output


def in_bash(line: str, where: Path) -> str:
    """Type a line of another program; returns what it printed."""
    done = subprocess.run(["bash", "-c", line], cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (line, done.stdout[-1000:], done.stderr[-2000:])
    return done.stdout


def exported(line: str, where: Path) -> dict[str, str]:
    """The variable that a line ``export NAME=VALUE`` of bash sets."""
    name = line.split()[1].partition("=")[0]
    return {name: in_bash(f"{line}; printenv {name}", where).strip()}


@contextmanager
def workers_in_threads() -> Iterator[None]:
    """Have benchmarks run their workers in this process: a start of Python costs more than a tiny model."""
    with pytest.MonkeyPatch.context() as patched:
        stand_in = SimpleNamespace(Popen=_Thread, PIPE=subprocess.PIPE)
        patched.setattr(worker, "subprocess", stand_in)
        yield


class _Thread:
    """What a ``subprocess.Popen`` of a worker can do."""

    def __init__(self, command: list[str], **_: Any) -> None:
        _interpreter, _p, _m, module, path, *options = command
        assert module == worker.__name__
        told = dict(zip(options[::2], options[1::2], strict=True))
        requests, asked = os.pipe()
        heard, answers = os.pipe()
        self.stdin, self.stdout = os.fdopen(asked, "wb"), os.fdopen(heard, "rb")
        self._thread = threading.Thread(
            target=_serve, args=(Path(path), told, requests, answers), daemon=True
        )
        self._thread.start()

    def kill(self) -> None:
        with suppress(OSError):
            self.stdin.close()

    def wait(self) -> int:
        self._thread.join()
        return 0


def _serve(path: Path, told: dict[str, str], requests: int, answers: int) -> None:
    threads = int(told["--threads"]) if "--threads" in told else None
    with os.fdopen(requests) as asked, os.fdopen(answers, "w") as heard, suppress(BrokenPipeError):
        worker.serve(path, threads=threads, runtime=told.get("--runtime"), requests=asked, answers=heard)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def _client(port: str, variables: dict[str, str]) -> Iterator[None]:
    """Ask the server that is going to listen on ``port`` for one token, and end it as Ctrl-C does."""
    status: list[int] = []
    over, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def ask() -> None:
        headers = {"Content-Type": "application/json"}
        if key := variables.get("NIRVANA_DEPLOY_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url, body = f"http://127.0.0.1:{port}/v1/completions", b'{"prompt": "Once", "max_tokens": 1}'
        for _ in range(_PATIENCE):
            with suppress(OSError), urlopen(Request(url, body, headers), timeout=60) as answer:
                status.append(answer.status)
            if status or over.wait(_PAUSE_S):
                break
        while signal.getsignal(signal.SIGINT) is before and not over.wait(_PAUSE_S):
            pass  # it answers before it hears signals
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    client = threading.Thread(target=ask)
    client.start()
    try:
        yield
    finally:
        over.set()
        client.join()
    assert status == [200]
