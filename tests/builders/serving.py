"""A tiny model as an ONNX folder with a chat template, a server of it, and plain requests to that."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from builders.tiny import write_tiny
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.export.recipe import Graph
from nirvana_deploy.pipeline.alone.onnx import export_onnx
from nirvana_deploy.serve.recipe import Serving
from nirvana_deploy.serve.server import Server, serving

CONTEXT_TOKENS = 512
_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('I was asked to') }}{% endif %}"
    "{% if messages[0].content == 'dawdle' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_served(folder: Path, *, template: str = _TEMPLATE) -> Path:
    """An ONNX folder of a random Llama whose context is CONTEXT_TOKENS."""
    checkpoint = write_tiny(folder / "checkpoint", "llama-tied")
    if template:
        (checkpoint / "chat_template.jinja").write_text(template)
    onnx = folder / "tiny"
    export_onnx(str(checkpoint), onnx, Graph())
    return onnx


@contextmanager
def served(folder: Path, progress: Progress = SILENT, **options: Any) -> Iterator[Server]:
    """A server of an ONNX folder on a free port, in this process."""
    with serving(
        folder, name="tiny", options=Serving(port=0, **options), threads=1, progress=progress
    ) as server:
        yield server


def asked(
    server: Server,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    timeout: float = 120,
) -> tuple[int, dict[str, str], Any]:
    """(status, headers in lower case, content) of one request; JSON where it is some."""
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=timeout)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **(headers or {})}
    try:
        connection.request(method, path, body=content, headers=sent)
        answer = connection.getresponse()
        said = {name.lower(): value for name, value in answer.getheaders()}
        text = answer.read()
        is_json = said.get("content-type", "").startswith("application/json")
        return answer.status, said, json.loads(text) if is_json else text.decode()
    finally:
        connection.close()


def refused(server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """(status, error) of a POST that is refused."""
    status, _, content = asked(server, "POST", path, body, headers)
    assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
    return status, content["error"]


def sent(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which a POST was sent, and nothing read."""
    place = urlsplit(url)
    sock = socket.create_connection((place.hostname, place.port), timeout=60)
    content = json.dumps(body).encode()
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    )
    sock.sendall("\r\n".join([*lines, "", ""]).encode() + content)
    return sock
