"""Two processes on gloo give the course of one; what cannot be shared is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from builders.jobs import SHORT
from builders.tiny import write_tiny

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.pipeline.folder import recover_folder
from nirvana_deploy.pipeline.prune_export import prune_export
from nirvana_deploy.prune.streaming import processes
from nirvana_deploy.recover.processes import require_fit
from nirvana_deploy.recover.recipe import Recovery

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--main_process_port", "0"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
"""Its word for several processes of one machine; without a GPU they talk by gloo."""


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


def recovered(
    out: Path, *options: str, launcher: Sequence[str] = TORCHRUN
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, "-m", "nirvana_deploy", "recover", str(out), "--learning-rate", "0.002", *options],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    "launcher", [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.slow)], ids=["torchrun", "accelerate"]
)
def test_two_processes_give_the_course_of_one(
    pruned: Path, text: Path, tmp_path: Path, launcher: list[str]
) -> None:
    for name in ("one", "two"):
        shutil.copytree(pruned, tmp_path / name)
    exact = {"recover_text": str(text), "learning_rate": 0.002, "recover_dtype": "float32"}
    recover_folder(tmp_path / "one", recover="1200", **exact)
    in_float32 = ("--recover-text", str(text), "--recover-dtype", "float32")
    done = recovered(tmp_path / "two", "--tokens", "1200", *in_float32, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Held-out KL") == 1
    one, two = (
        json.loads((tmp_path / name / "manifest.json").read_text())["stages"]["recover"]["result"]
        for name in ("one", "two")
    )
    assert (one["processes"], two["processes"]) == (1, 2) and len(one["curve"]) > 3
    at_two = {point["step"]: point["kl"] for point in two["curve"]}
    for point in one["curve"]:
        assert point["kl"] == pytest.approx(at_two[point["step"]], rel=1e-4)


@pytest.mark.slow
def test_what_the_first_process_cannot_do_ends_all_of_them(pruned: Path) -> None:
    done = recovered(pruned, "--tokens", "1200", "--recover-text", "nowhere.txt")
    assert done.returncode == 1
    assert done.stderr.count("Error: nowhere.txt does not exist.") == 1


def test_a_step_that_does_not_come_out_even_says_which_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_count", 3)
    with pytest.raises(NirvanaError, match=r"4 windows.*by 3 processes.\n.*--recover-batch 6"):
        require_fit(Recovery(recover="1k", recover_batch=4))


def test_block_by_block_has_no_use_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_count", 2)
    with pytest.raises(NirvanaError, match="layers runs in one process, and 2 were launched"):
        require_fit(Recovery(recover="1k", recover_method="layers"))


def test_a_number_of_processes_alone_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some clusters set it in every shell."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with processes.together():
        assert processes.count() == 1 and processes.is_first()
