"""A model in parts (FSDP2) on gloo trains as one process does; what it cannot do is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.extras import needs
from builders.jobs import SHORT
from builders.recovering import Cut
from builders.tiny import write_tiny
from safetensors.torch import load_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.output.layout import RECOVERY_STATE
from nirvana_deploy.pipeline.folder import recover_folder
from nirvana_deploy.pipeline.prune_export import prune_export
from nirvana_deploy.prune.streaming import processes
from nirvana_deploy.recover.learning import sharding
from nirvana_deploy.recover.processes import require_fit
from nirvana_deploy.recover.recipe import Recovery
from nirvana_deploy.recover.shared import _require_as_saved

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2"]
LAUNCH += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1"}
"""What ``accelerate launch`` tells the processes of it."""
EXACT: dict[str, Any] = {"learning_rate": 2e-3, "recover_dtype": "float32"}

IN_PARTS = """
import json, os, signal, sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from nirvana_deploy.base.progress import SILENT
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.streaming.processes import follow, is_first, together
from nirvana_deploy.recover import data, loop, shared, training
from nirvana_deploy.recover.before import require_recovery
from nirvana_deploy.recover.recipe import Recovery
from nirvana_deploy.recover.recovery import TextWanted, recover_checkpoint

folder, options, out, dies_at = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
windows = np.load(folder / "windows.npy")
told, steps = training._Told.on_step_end, 0
loop._MEASUREMENTS, data.OTHER_KINDS = 4, ()  # as in this suite

def stepped(self, *args, **kwargs):
    global steps
    steps += 1
    if steps == dies_at and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    told(self, *args, **kwargs)

training._Told.on_step_end = stepped
with together():
    if is_first():
        dense, recipe = Checkpoint.open(folder / "dense"), Recovery(**options)
        done = recover_checkpoint(
            Checkpoint.open(folder / "cut"), dense, recipe,
            TextWanted(seq_len=24, segment_tokens=24, seed=1), folder / out,
            state=folder / "state-of-two", identity={}, calibration=windows, progress=SILENT,
        )
        (folder / f"{out}.json").write_text(json.dumps(asdict(done.course)))
    else:
        follow({shared.RECOVER: shared.take_part})
"""


def in_two(
    cut: Cut, options: dict[str, Any], *, out: str = "parts", dies_at: int = 0
) -> subprocess.CompletedProcess[str]:
    """Train ``cut`` by two processes to the folder ``out``, whose course is beside it.

    Each has a part of the model, unless ``out`` is "whole". The second may die at the end of a step.
    """
    script = cut.folder / "in_parts.py"
    script.write_text(IN_PARTS)
    np.save(cut.folder / "windows.npy", cut.windows)
    recipe = {"recover": "1200", "recover_text": str(cut.text), **EXACT, **options}
    return subprocess.run(
        [*TORCHRUN, str(script), str(cut.folder), json.dumps(recipe), out, str(dies_at)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | FSDP | ({"ACCELERATE_USE_FSDP": "false"} if out == "whole" else {}),
    )


def same_curve(one: Sequence[dict[str, Any]], two: Sequence[dict[str, Any]], *, rel: float) -> None:
    kl_at = {point["step"]: point["kl"] for point in two}
    assert len(one) > 3
    for point in one:
        assert point["kl"] == pytest.approx(kl_at[point["step"]], rel=rel)


def same_weights(one: Path, two: Path, *, rel: float, least: float) -> None:
    weights = load_file(two)
    for name, tensor in load_file(one).items():
        torch.testing.assert_close(weights.pop(name), tensor, rtol=rel, atol=least)
    assert not weights


@pytest.mark.integration
def test_two_processes_with_a_part_of_the_model_each_give_the_course_of_one(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the command measures as it does
    write_tiny(tmp_path / "model", "llama-tied")
    prune_export(
        str(tmp_path / "model"),
        sparsity=0.3,
        calib=str(text),
        out=tmp_path / "one",
        until="checkpoint",
        **{**SHORT, "num_sequences": 8, "seq_len": 24, "run_benchmark": False},
    )
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    recover_folder(tmp_path / "one", recover="1200", recover_text=str(text), **EXACT)
    words = ["--tokens", "1200", "--recover-text", str(text), "--learning-rate", "0.002"]
    words += ["--recover-dtype", "float32"]
    done = subprocess.run(
        [*LAUNCH, "-m", "nirvana_deploy", "recover", str(tmp_path / "two"), *words],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        json.loads((tmp_path / name / "manifest.json").read_text())["stages"]["recover"]["result"]
        for name in ("one", "two")
    )
    assert (one["processes"], two["processes"]) == (1, 2) and one["kept_step"] == two["kept_step"]
    same_curve(one["curve"], two["curve"], rel=1e-4)
    checkpoint = "checkpoint/model.safetensors"
    same_weights(tmp_path / "one" / checkpoint, tmp_path / "two" / checkpoint, rel=1e-3, least=1e-4)
    assert not (tmp_path / "two" / RECOVERY_STATE).exists()


WAYS: dict[str, tuple[str, dict[str, Any], float]] = {
    "stored": ("llama-tied", {"recover_teacher": "stored"}, 1e-4),
    "full": ("llama-biased", {"recover_method": "full"}, 1e-4),
    "micro-batches": ("llama-biased", {"recover_micro_batch": 1, "recover_checkpointing": True}, 1e-4),
    "w4": ("llama-tied", {"recover_for": "w4"}, 1e-4),
    "int8": ("llama-tied", {"recover_for": "int8"}, 1e-4),
    "bfloat16": ("llama-tied", {"recover_dtype": "bfloat16"}, 2e-2),
}
"""A model, options, and how near the held-out KL comes to that of one process."""


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_comes_near_that_of_one(tmp_path: Path, text: Path, way: str) -> None:
    if way == "int8":
        needs("onnxruntime")
    kind, options, near = WAYS[way]
    cut = Cut(tmp_path, kind, text)
    one = cut.recover("one", **options)
    done = in_two(cut, options)
    assert done.returncode == 0, done.stderr[-3000:]
    course = json.loads((tmp_path / "parts.json").read_text())
    same_curve([asdict(point) for point in one.course.curve], course["curve"], rel=near)
    file = "model.safetensors"
    if near <= 1e-4:
        same_weights(tmp_path / "one" / file, tmp_path / "parts" / file, rel=1e-3, least=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama-tied", {"recover_method": "lora", "learning_rate": 1e-2}), ("flan-t5", {})],
    ids=["lora", "t5"],
)
def test_with_dropout_it_is_the_course_of_two_processes(
    tmp_path: Path, text: Path, kind: str, options: dict[str, Any]
) -> None:
    """Each of them drops others than one would."""
    needs("peft")
    cut = Cut(tmp_path, kind, text)
    for out in ("whole", "parts"):
        done = in_two(cut, options, out=out)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, parts = (json.loads((tmp_path / f"{out}.json").read_text()) for out in ("whole", "parts"))
    assert whole["kept_step"] == parts["kept_step"] > 0
    same_curve(whole["curve"], parts["curve"], rel=1e-4)
    file = "model.safetensors"
    same_weights(tmp_path / "whole" / file, tmp_path / "parts" / file, rel=1e-3, least=1e-4)


@pytest.mark.slow
def test_a_lost_process_leaves_nothing_half_written_and_the_training_goes_on(
    tmp_path: Path, text: Path
) -> None:
    cut = Cut(tmp_path, "llama-tied", text)
    one = cut.recover("one")
    lost = in_two(cut, {}, dies_at=7)
    assert lost.returncode != 0 and "Signal 9" in lost.stderr
    assert not (tmp_path / "parts").exists()
    assert json.loads((tmp_path / "state-of-two/schedule.json").read_text())
    done = in_two(cut, {})
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "state-of-two").exists()
    course = json.loads((tmp_path / "parts.json").read_text())
    assert course["kept_step"] == one.course.kept_step
    same_curve([asdict(point) for point in one.course.curve], course["curve"], rel=1e-4)
    file = "model.safetensors"
    same_weights(tmp_path / "one" / file, tmp_path / "parts" / file, rel=1e-3, least=1e-4)


@pytest.mark.parametrize(
    ("told", "options", "count", "said"),
    [
        ({}, {}, 1, r"one was launched\.\nPass --num_processes 2"),
        ({"FSDP_VERSION": "1"}, {}, 2, r"version 1 is asked for\.\nPass --fsdp_version 2"),
        (
            {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            2,
            r"fsdp_activation_checkpointing.*\n.*--recover-checkpointing",
        ),
        ({"FSDP_IGNORED_MODULES": ".*mlp"}, {}, 2, "fsdp_ignored_modules"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, 2, "use_parallelism_config"),
        ({}, {"recover": "30m"}, 2, r"30m is a time.*\n.*--recover 200k"),
        ({}, {"recover_method": "layers"}, 2, "layers runs in one process"),
    ],
)
def test_what_is_not_done_in_parts_is_said(
    monkeypatch: pytest.MonkeyPatch,
    told: dict[str, str],
    options: dict[str, str],
    count: int,
    said: str,
) -> None:
    for name, value in (FSDP | told).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_count", count)
    monkeypatch.setattr("nirvana_deploy.recover.processes.count", lambda: count)
    with pytest.raises(NirvanaError, match=said):
        require_fit(Recovery(**{"recover": "1k", **options}))


def test_a_training_goes_on_as_it_was_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, parts = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    for folder in (whole, parts):
        folder.mkdir()
    (parts / sharding.WEIGHTS).touch()
    _require_as_saved(whole, tmp_path)
    with pytest.raises(NirvanaError, match=r"begun under FSDP.*\nRepeat the command under FSDP"):
        _require_as_saved(parts, tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(processes, "_count", 2)
    _require_as_saved(parts, tmp_path)
    with pytest.raises(NirvanaError, match=r"begun without FSDP.*\nRepeat the command without FSDP"):
        _require_as_saved(whole, tmp_path)
