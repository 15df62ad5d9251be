"""Launched processes give the bytes of one, for every way to cut; one that is lost ends all of them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5

from nirvana_deploy.prune.curves.measure_curves import CURVES
from nirvana_deploy.prune.refit.reconstruct import REFIT
from nirvana_deploy.prune.streaming import processes
from nirvana_deploy.prune.streaming.score import SCORE

CUT = ("--sparsity", "0.3", "--seq-len", "24", "--micro-batch", "2", "--seed", "3")
BEST = ("--num-sequences", "18", "--micro-batch", "2")
WAYS = {
    "curves": BEST,
    "nirvana": (
        "--saliency",
        "nirvana",
        "--allocation",
        "global",
        "--num-sequences",
        "7",
        "--no-reconstruct",
    ),
    "nirvana-vocab": ("--saliency", "nirvana-vocab", "--allocation", "uniform", "--num-sequences", "7"),
    "taylor": ("--saliency", "taylor", "--num-sequences", "18"),
    "magnitude": ("--saliency", "magnitude", "--num-sequences", "7"),
    "random": ("--saliency", "random", "--allocation", "uniform", "--num-sequences", "7"),
    "wanda-sp": ("--preset", "fast", "--saliency", "wanda-sp", "--num-sequences", "18"),
    "flap": ("--saliency", "flap", "--allocation", "uniform", "--num-sequences", "7", "--no-reconstruct"),
}


LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run(number: int, model: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    launcher = (*LAUNCH, str(number)) if number > 1 else (sys.executable,)
    return subprocess.run(
        [*launcher, "-m", "nirvana_deploy", "prune", str(model), "--out", str(out), *CUT, *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough for windows of quality."""
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    file.write_text(
        "".join(f"Day {n}: {n * 7919 % 1000} apples, {n * 104729 % 997} pears.\n" for n in range(900))
    )
    return file


def bytes_of(out: Path) -> dict[str, str]:
    names = ("plan.json", "checkpoint/*.safetensors", "scores.safetensors", "curves.safetensors")
    files = [path for name in names for path in out.glob(name)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def same_bytes(
    model: Path, text: Path, folder: Path, counts: tuple[int, ...], options: tuple[str, ...]
) -> None:
    found = []
    for number in counts:
        done = run(number, model, folder / str(number), "--calib", str(text), *options)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(bytes_of(folder / str(number)))
    assert len(found[0]) >= 3 and all(one == found[0] for one in found)


@pytest.mark.integration
def test_two_processes_give_the_bytes_of_one(tmp_path: Path, text: Path) -> None:
    same_bytes(write_tiny(tmp_path / "model", "llama-tied"), text, tmp_path, (1, 2), WAYS["curves"])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama-tied", "gemma3", "flan-t5"])
def test_three_processes_do_too(tmp_path: Path, text: Path, kind: str, way: str) -> None:
    write = write_t5 if "t5" in kind else write_tiny
    same_bytes(write(tmp_path / "model", kind), text, tmp_path, (1, 2, 3), WAYS[way])


WHOLE = {"calibration.safetensors", "manifest.json", "recipe.toml"}
DIES = """
import os, signal, sys
from nirvana_deploy.cli.main import main
from nirvana_deploy.pipeline import launched
from nirvana_deploy.prune.streaming import processes

work = sys.argv.pop(1)
take_part, send, sent = launched._TAKE_PART[work], processes._send, None

def begun(*asked):
    global sent
    sent = 0
    take_part(*asked)
    sent = None

def dying(tensors, **to):
    global sent
    if sent is not None:
        sent += 1
        if sent == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    send(tensors, **to)

if os.environ["RANK"] == "1":
    launched._TAKE_PART[work], processes._send = begun, dying
main()
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("work", "way", "whole"),
    [
        (SCORE, "nirvana", WHOLE),
        (CURVES, "curves", WHOLE),
        (REFIT, "curves", WHOLE | {"curves.safetensors"}),
    ],
)
def test_a_lost_process_ends_all_with_one_message_and_nothing_half_written(
    tmp_path: Path, text: Path, work: str, way: str, whole: set[str]
) -> None:
    model, out = write_tiny(tmp_path / "model", "llama-tied"), tmp_path / "out"
    (tmp_path / "dies.py").write_text(DIES)
    words = ["prune", str(model), "--out", str(out), *CUT, *WAYS[way], "--calib", str(text)]
    done = subprocess.run(
        [*LAUNCH, "2", str(tmp_path / "dies.py"), work, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert "Signal 9" in done.stderr  # as the launcher says of the other one
    # The launcher may end the other one before it has heard of the loss itself.
    ends = ("Error: A process of this run was lost", "Interrupted. Finished stages are kept")
    assert sum(done.stderr.count(end) for end in ends) == 1, done.stderr[-3000:]
    assert "repeat the command with --resume" in done.stderr
    assert "cli/main.py" not in done.stderr  # the launcher has a trace of its own
    assert {path.name for path in out.iterdir()} == whole
    resumed = run(1, model, out, *WAYS[way], "--calib", str(text), "--resume")
    assert resumed.returncode == 0 and len(bytes_of(out)) == 3


def test_processes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_count", 4)
    taken = []
    for rank in range(4):
        monkeypatch.setattr(processes.distributed, "get_rank", lambda rank=rank: rank)
        own, share = processes.share_of(torch.arange(9)[:, None], 2)
        few, _ = processes.share_of(torch.arange(5)[:, None], 2)
        taken.append((own[:, 0].tolist(), list(share.turns("ab")), len(few)))
    assert taken == [
        ([0, 1, 8], [(0, "a"), (4, "b")], 2),
        ([2, 3], [(1, "a"), (5, None)], 2),
        ([4, 5], [(2, "a"), (6, None)], 1),
        ([6, 7], [(3, "a"), (7, None)], 0),  # which has nothing to do
    ]
