"""Commands that were not asked for a download open no socket to the network, workers included."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builders import no_network
from builders.desk import environment_at_a_desk
from builders.jobs import write_short_recipe
from builders.tiny import write_tiny

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not no_network.available(), reason="needs Linux on x86_64 or aarch64"),
]

_LONG_ENOUGH_S = 12
"""ONNX Runtime 1.32 looks its vendor up about nine seconds after it is imported."""
_RUN = """
import json, sys, time
from nirvana_deploy.cli.main import commands
started = time.monotonic()
for words in json.loads(sys.argv[1]):
    print("::", *words, flush=True)
    commands.main(words, standalone_mode=False)
import onnxruntime
time.sleep(max(0, float(sys.argv[2]) - (time.monotonic() - started)))
"""


def run_without_network(
    folder: Path, *commands: list[str], wait_s: float = 0, **setting: str
) -> subprocess.CompletedProcess[str]:
    """Run commands one after the other in one process with a home of its own that may open no socket."""
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    places = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    return subprocess.run(
        no_network.command(sys.executable, "-c", _RUN, json.dumps(commands), str(wait_s)),
        env=environment_at_a_desk() | places | setting,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_job_and_every_command_after_it_stay_on_this_machine(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", "llama-tied")
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"query": "One two", "choices": [" three", " four"], "gold": 0}) + "\n")
    recipe = write_short_recipe(model, tmp_path / "recipe.toml", sparsity=0.3, num_sequences=4, seq_len=16)
    out, quick = str(tmp_path / "out"), ["--threads", "1"]
    done = run_without_network(
        tmp_path,
        ["prune-export", "--recipe", str(recipe), "--out", out, "--quantize", "int8", *quick],
        ["evaluate", out, "--tasks", str(task), *quick],
        ["verify", out, *quick],
        ["generate", out, "--prompt", "Hello", "--max-new-tokens", "2", "--chat"],
        ["package", out, "--triton"],
        ["report", out],
        ["inspect", out],
        ["models"],
        ["doctor"],
        wait_s=_LONG_ENOUGH_S,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert [path for path in (tmp_path / "home").rglob("*") if "Microsoft" in path.parts] == []


def test_the_test_above_can_fail(tmp_path: Path) -> None:
    """The runtime's telemetry, left on by the user, ends such a process."""
    done = run_without_network(tmp_path, wait_s=_LONG_ENOUGH_S, ORT_DISABLE_TELEMETRY="0")
    assert done.returncode == -signal.SIGSYS
