"""Two processes on gloo give the course of one; what cannot be shared is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.jobs import SHORT
from builders.tiny import write_tiny

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.pipeline.prune_export import prune_export
from nirvana_deploy.recover import processes

ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    write_tiny(folder / "model", "llama-tied")
    prune_export(
        str(folder / "model"),
        sparsity=0.3,
        calib=str(text),
        out=folder / "out",
        **{**SHORT, "num_sequences": 8, "seq_len": 24, "run_benchmark": False},
    )
    return folder / "out"


def recovered(launcher: list[str], out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, "-m", "nirvana_deploy", "recover", str(out), "--learning-rate", "0.002", *options],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_two_processes_give_the_course_of_one(pruned: Path, text: Path, tmp_path: Path) -> None:
    curves: list[list[dict[str, Any]]] = []
    for name, launcher in (("one", ONE), ("two", TWO)):
        shutil.copytree(pruned, tmp_path / name)
        done = recovered(launcher, tmp_path / name, "--tokens", "1200", "--recover-text", str(text))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Held-out KL") == 1
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        found = manifest["stages"]["recover"]["result"]
        assert found["processes"] == (1 if name == "one" else 2)
        curves.append(found["curve"])
    assert len(curves[0]) > 3
    for one, two in zip(*curves, strict=True):
        assert (one["step"], one["kl"]) == (two["step"], pytest.approx(two["kl"], rel=1e-4))


def test_what_the_first_process_cannot_do_ends_all_of_them(pruned: Path) -> None:
    done = recovered(TWO, pruned, "--tokens", "1200", "--recover-text", "nowhere.txt")
    assert done.returncode == 1
    assert done.stderr.count("Error: nowhere.txt does not exist.") == 1


def test_a_step_that_does_not_come_out_even_says_which_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(NirvanaError, match=r"4 windows.*by 3 processes.\n.*--recover-batch 6"):
        processes.share_of(4)


def test_a_model_in_parts_is_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(NirvanaError, match="not the model, and FSDP"), processes.together():
        pass
