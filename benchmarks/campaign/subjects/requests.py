"""Requests: what a server must bear. Each gets an answer of its kind, and the next one a good answer.

Heads and bodies are damaged, byte for byte or value by value, and some clients go away in the middle.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from random import Random
from typing import Any

from campaign.mutations import changed_json
from campaign.subject import Result
from campaign.trial import finished, start
from campaign.world import World

UNIT = "hostile requests"
LONG = True
"""One server bears them all."""
_INPUTS = ("onnx",)
_PATIENCE_S = 30.0
_GLANCE_S = 0.3
"""How long somebody waits for an answer to what may be no whole request."""
_ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/v1/completions", {"model": "m", "prompt": "One", "max_tokens": 2, "stop": ["a"], "seed": 1}),
    (
        "POST",
        "/v1/chat/completions",
        {"model": "m", "messages": [{"role": "user", "content": "One"}], "max_tokens": 2, "temperature": 0.5},
    ),
    ("POST", "/v1/completions", {"model": "m", "prompt": ["One", "Two"], "max_tokens": 2, "stream": True}),
    ("GET", "/v1/models", None),
    ("GET", "/health", None),
    ("GET", "/metrics", None),
)
_HEADS = (
    "Content-Length: 10\r\nContent-Length: 20",
    "Content-Length: -1",
    "Content-Length: " + "9" * 40,
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 3",
    "Expect: 100-continue",
    "Content-Type: text/plain",
    "X-Long: " + "x" * 100_000,
    "\r\n".join(f"X-{number}: 1" for number in range(500)),
    "Upgrade: websocket\r\nConnection: Upgrade",
    "Authorization: Bearer \xe9",
    "Host: \x00",
)


def why_not() -> str | None:
    """Why no server can run here."""
    return (
        None if importlib.util.find_spec("fastapi") else "needs fastapi: pip install 'nirvana-deploy[serve]'"
    )


def trial(world: World, random: Random, requests: int) -> Result:
    """``requests`` bad ones on one server, then a good one; then the server is told to end."""
    with world.folder(*_INPUTS) as folder:
        began = time.monotonic()
        pid = start(_serve, folder=folder, limited=False)
        complaints: list[str] = []
        try:
            place = _address(folder, pid)
            for _ in range(requests):
                complaints += _asked(place, random)
            complaints += _good(place)
        except OSError as error:
            complaints.append(f"the server is gone: {error}")
        finally:
            os.kill(pid, signal.SIGTERM)
            ended = finished(pid, began, folder=folder, limited=False)
        complaints += ended.complaints(allowed=frozenset({0}))
        return Result(f"{requests} requests", complaints[:20], count=requests, output=ended.stderr)


def _serve() -> None:
    from nirvana_deploy.cli.main import commands

    words = ["serve", "onnx", "--port", "0", "--slots", "2", "--model-name", "m", "--max-new-tokens", "4"]
    commands.main(words, standalone_mode=False)


def _address(folder: Path, pid: int) -> tuple[str, int]:
    """Where the server listens, once it says so."""
    said, until = Path(f"{folder}.out"), time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        if said.exists() and (found := re.search(r"http://([\d.]+):(\d+)", said.read_text())):
            return found[1], int(found[2])
        time.sleep(0.05)
    raise OSError("it did not listen")


def _asked(place: tuple[str, int], random: Random) -> list[str]:
    """Send one bad request; returns what is wrong with its answer."""
    method, path, body = random.choice(_ROUTES)
    how = random.choice(("value", "value", "value", "head", "bytes", "bytes", "noise", "leaves"))
    where, head = "", ""
    if how == "value" and body is not None:
        body, where = changed_json(json.loads(json.dumps(body)), random)
    if how == "head":
        head = random.choice(_HEADS)
    sent = _written(method, path, body, head)
    if how == "bytes":
        sent = _flipped(sent, random)
    if how == "noise":
        sent = random.randbytes(random.randrange(1, 3000))
    if how == "leaves":
        sent = sent[: random.randrange(len(sent))]
    whole = how == "value"
    answer = _exchanged(place, sent, _PATIENCE_S if whole else 0.001 if how == "leaves" else _GLANCE_S)
    complaint = _complaint(answer, whole=whole)
    return [f"{how} {method} {path} {where}: {complaint}"] if complaint else []


def _written(method: str, path: str, body: Any, head: str = "") -> bytes:
    content = b"" if body is None else json.dumps(body).encode("utf-8", errors="surrogatepass")
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
    if head:
        lines.append(head)
    if body is not None and "Content-Length" not in head:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


def _flipped(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randrange(1, 6)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def _exchanged(place: tuple[str, int], sent: bytes, patience_s: float) -> bytes:
    """All that comes back within ``patience_s``."""
    received = b""
    with socket.create_connection(place, timeout=_PATIENCE_S) as connection:
        connection.settimeout(patience_s)
        try:
            connection.sendall(sent)
            while part := connection.recv(1 << 16):
                received += part
        except (ConnectionError, TimeoutError):  # it need not hear us out, nor we it
            return received
    return received


def _complaint(answer: bytes, *, whole: bool) -> str:
    """What is wrong with an answer; one to a ``whole`` request must be there, and say what it refuses."""
    if not answer:
        return "no answer" if whole else ""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.1 (\d{3})", head)
    if status is None:
        return f"no HTTP: {answer[:60]!r}"
    code = int(status[1])
    if code >= 500:
        return f"status {code}: {body[:200]!r}"
    if code >= 400 and whole:
        try:
            said = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return f"status {code} without a reason: {body[:200]!r}"
        return "" if said and "\n" not in said else f"status {code} with the reason {said!r}"
    return ""


def _good(place: tuple[str, int]) -> list[str]:
    """What is wrong with how a good request is answered afterwards, and with what is still under way."""
    method, path, body = _ROUTES[0]
    answer = _exchanged(place, _written(method, path, body), _PATIENCE_S)
    if b" 200 " not in answer[:20]:
        return [f"a good request afterwards: {answer[:200]!r}"]
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        said = _exchanged(place, _written("GET", "/health", None), _PATIENCE_S)
        health = json.loads(said.partition(b"\r\n\r\n")[2])
        if not health["active"] and not health["waiting"]:
            return []
        time.sleep(0.1)
    return [f"still under way: {health}"]
