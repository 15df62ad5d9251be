"""Commands that were not asked for a download open no socket to the network, workers included."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from builders import no_network
from builders.desk import environment_at_a_desk
from builders.extras import needs
from builders.gguf_files import write_merges
from builders.jobs import write_short_recipe
from builders.tiny import write_tiny

from nirvana_deploy.cli.main import commands

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


def commands_on(folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    """A short job with what follows it; and the other commands."""
    model = write_tiny(folder / "model", "llama-tied")
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    task = folder / "task.jsonl"
    task.write_text(json.dumps({"query": "One two", "choices": [" three", " four"], "gold": 0}) + "\n")
    text = folder / "text.txt"
    text.write_text("".join(f"Day {n}: {n * 7919 % 1000} apples and some pears.\n" for n in range(100)))
    few = {"sparsity": 0.3, "num_sequences": 4, "seq_len": 16}
    recipe = write_short_recipe(model, folder / "recipe.toml", **few)
    out, onnx, quick = str(folder / "out"), str(folder / "onnx"), ["--threads", "1"]
    int8 = ["--quantize", "int8", "--no-baseline-quantized"]
    job = [
        ["prune-export", "--recipe", str(recipe), "--out", out, *int8, *quick],
        ["evaluate", out, "--tasks", str(task), *quick],
        ["verify", out, *quick],
        ["generate", out, "--prompt", "Hello", "--max-new-tokens", "2", "--chat"],
        ["recover", out, "--tokens", "128", "--recover-batch", "2", "--recover-text", str(text)],
        ["package", out, "--triton"],
        ["report", out],
        ["inspect", out],
        ["models"],
        ["doctor"],
        ["recipe", "--recipe", str(recipe)],
    ]
    words = ["--sparsity", "0.3", "--num-sequences", "4", "--seq-len", "16"]
    others = [
        ["prune", str(model), *words, "--preset", "paper", "--out", str(folder / "pruned")],
        ["select-calib", str(model), *words],
        ["export", str(model), "--out", onnx],
        ["quantize", onnx, "--scheme", "w8", "--out", str(folder / "w8")],
        ["package", str(model), "--gguf", "--out", str(folder / "model.gguf")],
        ["benchmark", out, "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", *quick],
        ["search", "--recipe", str(recipe), "--sparsity", "0,0.3", "--out", str(folder / "search")],
        ["build-engine", onnx, "--max-length", "64", "--out", str(folder / "engine")],
    ]
    return job, others


def test_a_job_and_every_command_after_it_stay_on_this_machine(tmp_path: Path) -> None:
    job, _ = commands_on(tmp_path)
    done = run_without_network(tmp_path, *job, wait_s=_LONG_ENOUGH_S)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert [path for path in (tmp_path / "home").rglob("*") if "Microsoft" in path.parts] == []


@pytest.mark.slow
def test_the_other_commands_stay_on_this_machine(tmp_path: Path) -> None:
    needs("tensorrt_rtx")
    job, others = commands_on(tmp_path)
    write_merges(tmp_path / "model")  # llama.cpp refuses a BPE without
    done = run_without_network(tmp_path, job[0], *others, wait_s=_LONG_ENOUGH_S)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]


def test_no_command_is_left_out(tmp_path: Path) -> None:
    """Of those that ``--help`` shows; a new one joins above. ``serve`` listens, and has tests of its own."""
    job, others = commands_on(tmp_path)
    shown = set(commands.list_commands(click.Context(commands)))
    assert {words[0] for words in (*job, *others)} == shown - {"serve"}


def test_the_test_above_can_fail(tmp_path: Path) -> None:
    """The runtime's telemetry, left on by the user, ends such a process."""
    done = run_without_network(tmp_path, wait_s=_LONG_ENOUGH_S, ORT_DISABLE_TELEMETRY="0")
    assert done.returncode == -signal.SIGSYS
