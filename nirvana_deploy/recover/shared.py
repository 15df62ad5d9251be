"""The training of one recovery, by this process alone or by several that were launched together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import disk_errors
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.recover import processes
from nirvana_deploy.recover.learning.states import StatesOf
from nirvana_deploy.recover.learning.student import Student, trainable
from nirvana_deploy.recover.learning.teacher import LiveTeacher, StoredTeacher
from nirvana_deploy.recover.loop import Course, Loop
from nirvana_deploy.recover.recipe import Recovery

TEACHER, WINDOWS = "teacher", "windows.safetensors"
"""In the folder of saved states: the dense model's, and what all processes read."""


@dataclass(frozen=True)
class Training:
    """What every process of a training must know, beside the windows."""

    cut: Checkpoint
    dense: Checkpoint
    recipe: Recovery
    loop: Loop
    state: Path
    """The folder of saved states."""
    stored_teacher: bool

    def to_json(self, begin: Path | None) -> dict[str, Any]:
        """For the other processes; ``begin`` is the saved state to go on from."""
        return {
            "cut": str(self.cut.path),
            "dense": str(self.dense.path),
            "recipe": dataclasses.asdict(self.recipe),
            "loop": dataclasses.asdict(self.loop),
            "state": str(self.state),
            "stored_teacher": self.stored_teacher,
            "begin": None if begin is None else str(begin),
        }


def compute_device() -> torch.device:
    """This process's GPU, if torch sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_to_train(cut: Checkpoint, recipe: Recovery) -> StatesOf:
    """The cut on this process's device, with what is trained of it."""
    model = cut.load().train()
    trainable(model, recipe)
    return StatesOf(cut, model.to(compute_device()))


def trained(
    training: Training,
    pruned: StatesOf,
    train: NDArray[np.int64],
    watch: NDArray[np.int64],
    *,
    progress: Progress,
) -> Course:
    """Train ``pruned`` in place on windows [N, T], watched by others [M, T], with all processes there are."""
    from nirvana_deploy.recover.training import last_whole

    begin = last_whole(training.state)
    if processes.count() > 1:
        training.state.mkdir(parents=True, exist_ok=True)
        with disk_errors(training.state):
            save_file({"train": train, "watch": watch}, training.state / WINDOWS)
    processes.tell(training.to_json(begin))
    loop = training.loop
    label = f"Recovering on {loop.steps * loop.step_windows * train.shape[1]:,} tokens"
    return _run(training, pruned, train, watch, begin=begin, label=label, progress=progress)


def take_part(work: dict[str, Any]) -> None:
    """Do what the first process is doing, for its gradients alone."""
    training = Training(
        cut=Checkpoint.open(Path(work["cut"])),
        dense=Checkpoint.open(Path(work["dense"])),
        recipe=Recovery(**work["recipe"]),
        loop=Loop(**work["loop"]),
        state=Path(work["state"]),
        stored_teacher=work["stored_teacher"],
    )
    windows = load_file(training.state / WINDOWS)
    _run(
        training,
        model_to_train(training.cut, training.recipe),
        windows["train"],
        windows["watch"],
        begin=None if work["begin"] is None else Path(work["begin"]),
        label="Recovering",
        progress=SILENT,
    )


def _run(
    training: Training,
    pruned: StatesOf,
    train: NDArray[np.int64],
    watch: NDArray[np.int64],
    *,
    begin: Path | None,
    label: str,
    progress: Progress,
) -> Course:
    from nirvana_deploy.recover.training import fit  # whose Trainer takes four seconds to import

    teacher = (
        StoredTeacher(training.state / TEACHER, pruned)
        if training.stored_teacher
        else LiveTeacher(training.dense, compute_device())
    )
    student = Student(pruned, teacher, training.recipe)
    with progress.task(label, training.loop.steps) as advance:
        course = fit(student, train, watch, training.loop, state=training.state, begin=begin, advance=advance)
    processes.wait_for_all()  # the saved states are removed next
    return course
