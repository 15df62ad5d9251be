"""``nirvana-deploy serve`` as a program: it says where it listens, drains, and refuses in words."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from builders.extras import needs
from builders.jobs import TINY_JOB
from builders.tiny import INTERRUPTIBLE, write_tiny
from click.testing import CliRunner

needs("uvicorn")
needs("fastapi")
needs("prometheus_client")

from builders.serving import sent, write_served  # noqa: E402

from nirvana_deploy import prune_export  # noqa: E402
from nirvana_deploy.base.errors import NirvanaError, install_extra  # noqa: E402
from nirvana_deploy.cli.main import commands  # noqa: E402
from nirvana_deploy.pipeline.alone.serve import serve_folder, served_model  # noqa: E402
from nirvana_deploy.runtime.recipe import Place  # noqa: E402

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with pruned, pruned-w8 and dense, and no verdict."""
    base = tmp_path_factory.mktemp("out")
    checkpoint = write_tiny(base / "tiny", "llama-tied")
    prune_export(str(checkpoint), out=base / "job", quantize=("w8",), run_benchmark=False, **TINY_JOB)
    return base / "job"


@contextmanager
def running(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command at work, and what it said as JSON."""
    words = ["serve", str(folder), "--port", "0", "--json", "--threads", "1", *options]
    start = "from nirvana_deploy.cli.main import main; main()"
    script = f"{INTERRUPTIBLE}import sys; sys.argv[1:] = {words!r}; {start}"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True)
    try:
        assert child.stdout is not None
        said = ""
        while not said.endswith("}\n") and (line := child.stdout.readline()):
            said += line
        yield child, json.loads(said)
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_open_answers_end(folder: Path, number: signal.Signals) -> None:
    with running(folder) as (child, said):
        body = {"prompt": "Once", "max_tokens": 480, "stream": True, "seed": 1}
        with closing(sent(said["url"], "/v1/completions", body)) as sock:
            text = sock.recv(64)
            child.send_signal(number)
            while piece := sock.recv(1 << 16):
                text += piece
        assert b"data: [DONE]" in text and b'"finish_reason": "' in text
        _, told = child.communicate(timeout=60)
        assert child.returncode == 0, told
    assert (
        "Ending; 1 answers are open (once more to end at once)." in told and "Ended after 1 answers." in told
    )
    assert "Traceback" not in told and said["model"] == "tiny" and said["context_tokens"] == 512


def test_the_process_ends_though_a_client_asks_for_nothing(folder: Path) -> None:
    with running(folder, "--drain-seconds", "5") as (child, said):
        place = urlsplit(said["url"])
        with closing(socket.create_connection((place.hostname, place.port), timeout=60)) as sock:
            sock.sendall(b"POST /v1/comp")
            child.terminate()
            child.communicate(timeout=60)
            assert child.returncode == 0


def test_the_recommended_model_is_served_else_the_pruned_one(out: Path) -> None:
    notes: list[str] = []

    class Noted:
        def note(self, text: str) -> None:
            notes.append(text)

    folder, name = served_model(out, None, progress=Noted())  # type: ignore[arg-type]
    assert (folder, name) == (out / "onnx", "job/pruned")
    assert notes == [
        "Serving pruned, as its report recommends none; --variant names another: dense, pruned, dense-w8, "
        "pruned-w8."
    ]
    assert served_model(out, "pruned-w8") == (out / "onnx-w8", "job/pruned-w8")
    assert served_model(out / "onnx-w8", None) == (out / "onnx-w8", "onnx-w8")


def test_what_cannot_be_served_is_refused(out: Path, folder: Path, tmp_path: Path) -> None:
    for path, variant, said in (
        (out, "pruned-w9", "Unknown variant 'pruned-w9'. Did you mean 'pruned-w8'"),
        (folder, "pruned", "is one model, not an output folder"),
        (out / "checkpoint", None, "is a checkpoint; what is served is an ONNX folder"),
        (tmp_path, None, "manifest.json"),
    ):
        with pytest.raises(NirvanaError, match=said):
            served_model(path, variant)
    with pytest.raises(NirvanaError, match="The runtime torch runs no ONNX folders"):
        serve_folder(folder, place=Place(runtime="torch"))


def test_without_the_extra_the_command_that_installs_it_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(NirvanaError, match="needs the package 'uvicorn'") as refused:
        serve_folder(folder)
    assert refused.value.hint == install_extra("serve")


def test_a_port_that_is_taken_is_said_in_a_sentence(folder: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        done = CliRunner().invoke(commands, ["serve", str(folder), "--port", str(taken.getsockname()[1])])
    assert isinstance(done.exception, NirvanaError)
    assert "cannot be listened on: Address already in use" in str(done.exception)
