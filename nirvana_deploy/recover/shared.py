"""The training of one recovery, by this process alone or by several that were launched together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import disk_errors
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.streaming import processes
from nirvana_deploy.prune.streaming.loading import compute_device
from nirvana_deploy.quantize.schemes import scheme_named
from nirvana_deploy.recover.data import TrainingText
from nirvana_deploy.recover.learning.dtype import computing, in_bfloat16
from nirvana_deploy.recover.learning.int8_decision import read_decision
from nirvana_deploy.recover.learning.int8_training import compute_in_int8
from nirvana_deploy.recover.learning.rounded import round_while_training
from nirvana_deploy.recover.learning.sharding import WEIGHTS, gathered, is_sharded, widened
from nirvana_deploy.recover.learning.states import StatesOf
from nirvana_deploy.recover.learning.student import Student, probe, trainable, trained_tensors
from nirvana_deploy.recover.learning.teacher import (
    LiveTeacher,
    StandIn,
    StoredTeacher,
    Teacher,
    store_states,
)
from nirvana_deploy.recover.loop import Course, Loop, micro_batch_of
from nirvana_deploy.recover.processes import share_of
from nirvana_deploy.recover.recipe import Recovery

_BESIDE = 1.2
"""A step with its part of the optimizer, measuring and saving, in times of its gradients; of SmolLM2."""
RECOVER = "recover"
"""The work that processes share."""
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
            "work": RECOVER,
            "cut": str(self.cut.path),
            "dense": str(self.dense.path),
            "recipe": dataclasses.asdict(self.recipe),
            "loop": dataclasses.asdict(self.loop),
            "state": str(self.state),
            "stored_teacher": self.stored_teacher,
            "begin": None if begin is None else str(begin),
        }


def model_to_train(cut: Checkpoint, recipe: Recovery, state: Path) -> StatesOf:
    """The cut on this process's device, with what is trained of it, rounded as it is to be deployed.

    For a scheme that rounds activations, the folder ``state`` says how. A model that is going to be in parts
    stays on the CPU until it is.
    """
    model = cut.load().train()
    trainable(model, recipe)
    if recipe.recover_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # the other's name in newer versions
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    scheme = None if recipe.recover_for is None else scheme_named(recipe.recover_for)
    if scheme is not None and scheme.activation_bits is not None:
        head = model.get_output_embeddings()
        linears = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
        widths = {name: one.in_features for name, one in linears.items() if one is not head}
        compute_in_int8(model, read_decision(state, widths))
    elif scheme is not None:
        round_while_training(model, scheme.name)
    return StatesOf(cut, widened(model) if is_sharded() else model.to(compute_device()))


def trained(
    training: Training,
    pruned: StatesOf,
    train: NDArray[np.int64],
    watch: Sequence[NDArray[np.int64]],
    *,
    progress: Progress,
) -> Course:
    """Train ``pruned`` in place on windows [N, T], watched by [M, T] of each kind, with all processes."""
    from nirvana_deploy.recover.training import last_whole

    begin = last_whole(training.state)
    _require_as_saved(begin, training.state)
    if processes.count() > 1:
        training.state.mkdir(parents=True, exist_ok=True)
        with disk_errors(training.state):
            kinds = {f"watch-{kind}": windows for kind, windows in enumerate(watch)}
            save_file({"train": train, **kinds}, training.state / WINDOWS)
    processes.tell(training.to_json(begin))
    loop = training.loop
    label = f"Recovering on {loop.steps * loop.step_windows * train.shape[1]:,} tokens"
    return _run(training, pruned, train, watch, begin=begin, label=label, progress=progress)


def _require_as_saved(begin: Path | None, state: Path) -> None:
    """Raise NirvanaError for a saved state of a model in parts where it is whole now, and the reverse."""
    if begin is not None and (in_parts := (begin / WEIGHTS).is_file()) != is_sharded():
        how = "under FSDP" if in_parts else "without FSDP"
        raise NirvanaError(
            f"The training was begun {how}, and {begin} holds its state.",
            hint=f"Repeat the command {how} to go on, or remove {state} to begin again.",
        )


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
        model_to_train(training.cut, training.recipe, training.state),
        windows.pop("train"),
        [windows[name] for name in sorted(windows)],
        begin=None if work["begin"] is None else Path(work["begin"]),
        label="Recovering",
        progress=SILENT,
    )


def _run(
    training: Training,
    pruned: StatesOf,
    train: NDArray[np.int64],
    watch: Sequence[NDArray[np.int64]],
    *,
    begin: Path | None,
    label: str,
    progress: Progress,
) -> Course:
    from nirvana_deploy.recover.training import fit  # whose Trainer takes four seconds to import

    teacher = (
        StoredTeacher(training.state / TEACHER, pruned)
        if training.stored_teacher
        else LiveTeacher(training.dense, bfloat16=training.loop.bfloat16)
    )
    student = Student(pruned, teacher, training.recipe)
    with progress.task(label, training.loop.steps) as advance:
        course = fit(
            student,
            train,
            watch,
            training.loop,
            state=training.state,
            begin=begin,
            log=training.recipe.recover_log,
            advance=advance,
        )
    if is_sharded() and (weights := gathered(student)):
        pruned.model = model_to_train(training.cut, training.recipe, training.state).model
        Student(pruned, teacher, training.recipe).load_state_dict(weights)
    processes.wait_for_all()  # the saved states are removed next
    return course


class WholeModel:
    """The cut whole in memory, with gradients and moments; the dense one beside it, or its states on disk."""

    def __init__(
        self, cut: Checkpoint, dense: Checkpoint, recipe: Recovery, state: Path, *, stored_teacher: bool
    ) -> None:
        self._cut, self._dense, self._recipe, self._state = cut, dense, recipe, state
        self.stored_teacher = stored_teacher
        self._pruned: StatesOf | None = model_to_train(cut, recipe, state)
        trained = [one.numel() for one in self._pruned.model.parameters() if one.requires_grad]
        self.trained_parameters = sum(trained)

    @property
    def _model(self) -> StatesOf:
        if self._pruned is None:
            self._pruned = model_to_train(self._cut, self._recipe, self._state)
        return self._pruned

    def seconds_of_step(self, seq_len: int) -> float:
        """Of this process's share of a step."""
        shape, device = self._cut.shape, compute_device()
        teacher: Teacher = (
            StandIn(self._model, shape.hidden_size) if self.stored_teacher else LiveTeacher(self._dense)
        )
        random = torch.Generator().manual_seed(0)
        share = (share_of(self._recipe.recover_batch), seq_len)
        windows = torch.randint(0, shape.vocab_size, share, generator=random)
        student = Student(self._model, teacher, self._recipe)
        with computing(in_bfloat16(self._recipe)):
            return _BESIDE * probe(student, windows.to(device), micro_batch=micro_batch_of(self._recipe))

    def make_ready(self, text: TrainingText, progress: Progress) -> None:
        """Write the dense model's states to disk, if they are to lie there, without the cut in memory."""
        if self.stored_teacher:
            self._pruned = None
            store_states(self._dense, text.windows, self._state / TEACHER, progress=progress)

    def train(self, text: TrainingText, loop: Loop, progress: Progress) -> Course:
        """Together with all processes there are."""
        training = Training(self._cut, self._dense, self._recipe, loop, self._state, self.stored_teacher)
        return trained(training, self._model, text.train.tokens, text.watching, progress=progress)

    def trained_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Float32; adapters are merged."""
        return trained_tensors(self._model.model)
