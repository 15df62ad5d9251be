"""From a cut to trained tensors: text, student and teacher, the loop, and what is kept of it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file

from nirvana_deploy.base.artifact import whole_folder, write_json
from nirvana_deploy.base.ownership.marker import foreign
from nirvana_deploy.base.ownership.temporary import PREFIX, remove
from nirvana_deploy.base.progress import Progress
from nirvana_deploy.base.resources import (
    disk_errors,
    free_memory_bytes,
    require_free_bytes,
    require_memory,
)
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.weights import SafetensorsWeights, joined
from nirvana_deploy.recover.budget import budget_of
from nirvana_deploy.recover.data import TrainingText, training_text
from nirvana_deploy.recover.layers import seconds_of_step, train_layers
from nirvana_deploy.recover.learning.states import StatesOf
from nirvana_deploy.recover.learning.student import Student, probe, trained_tensors
from nirvana_deploy.recover.learning.teacher import LiveTeacher, StandIn, Teacher, store_states
from nirvana_deploy.recover.loop import Course, Loop, whole_steps
from nirvana_deploy.recover.processes import alone, share_of
from nirvana_deploy.recover.recipe import Recovery
from nirvana_deploy.recover.shared import (
    TEACHER,
    WINDOWS,
    Training,
    compute_device,
    model_to_train,
    trained,
)

_STATE_BYTES = 3 * 4
"""A parameter that is trained, and its two moments."""
_SAVED_STATES = 3
"""The best one, the last one, and the one that is being written."""
_BESIDE = 1.2
"""A step with its part of the optimizer, measuring and saving, in times of its gradients; of SmolLM2."""
_SCHEDULE = "schedule.json"


@dataclass(frozen=True)
class Trained:
    """What :func:`recover_checkpoint` did."""

    text: TrainingText
    loop: Loop
    course: Course
    writing_seconds: float
    trained_parameters: int
    stored_teacher: bool


@dataclass(frozen=True)
class TextWanted:
    """Which windows to draw, beside the recipe's source."""

    seq_len: int
    segment_tokens: int
    """The longer of a calibration and a held-out window."""
    seed: int


def recover_checkpoint(
    cut: Checkpoint,
    dense: Checkpoint,
    recipe: Recovery,
    wanted: TextWanted,
    out: Path,
    *,
    state: Path,
    identity: dict[str, Any],
    progress: Progress,
) -> Trained:
    """Train ``cut`` toward ``dense``; write what changed to the folder ``out``, in the stored dtypes.

    ``state`` is where a killed training left its course; it is gone on with where ``identity`` (options and
    hashes, JSON) is the same, and removed in the end. Raises NirvanaError for too little text, time, memory
    or disk, and for a loss that is not finite.
    """
    if recipe.recover_method == "layers":
        return _by_layers(cut, dense, recipe, wanted, out, state=state, identity=identity, progress=progress)
    pruned = model_to_train(cut, recipe)
    parameters = sum(one.numel() for one in pruned.model.parameters() if one.requires_grad)
    stored = _stores_teacher(recipe, parameters, dense)
    require_free_bytes(out.parent, _SAVED_STATES * _STATE_BYTES * parameters, what="Recovery")
    begun = _begun(state, identity, micro_batch=_micro_batch(recipe))
    loop = begun or _planned(pruned, None if stored else dense, recipe, wanted)
    if stored:
        del pruned  # the dense model alone is in memory while it writes and is run
    started = time.perf_counter()
    text = _text(dense, recipe, wanted, loop, progress)
    train, watch = text.train.tokens, text.watch
    if stored:
        store_states(dense, np.concatenate([train, watch]), state / TEACHER, progress=progress)
        pruned = model_to_train(cut, recipe)
    writing_seconds = time.perf_counter() - started
    if begun is None:
        loop = _shortened(loop, recipe, wanted.seq_len, writing_seconds)
        _remember(state, identity, loop)
    course = trained(
        Training(cut, dense, recipe, loop, state, stored), pruned, train, watch, progress=progress
    )
    _write(out, cut, trained_tensors(pruned.model), course)
    remove(state)
    return Trained(text, loop, course, round(writing_seconds, 3), parameters, stored)


def _by_layers(
    cut: Checkpoint,
    dense: Checkpoint,
    recipe: Recovery,
    wanted: TextWanted,
    out: Path,
    *,
    state: Path,
    identity: dict[str, Any],
    progress: Progress,
) -> Trained:
    """As :func:`recover_checkpoint`, with one block of each model in memory."""
    alone(recipe.recover_method)
    begun = _begun(state, identity, micro_batch=recipe.recover_batch)
    loop = begun or _loop(recipe, wanted, seconds=partial(seconds_of_step, cut, dense, recipe))
    started = time.perf_counter()
    text = _text(dense, recipe, wanted, loop, progress)
    writing_seconds = time.perf_counter() - started
    if begun is None:
        loop = _shortened(loop, recipe, wanted.seq_len, writing_seconds)
        _remember(state, identity, loop)
    label = f"Recovering layer by layer, {loop.steps} steps each"
    with progress.task(label, len(cut.shape.layers)) as advance:
        course = train_layers(
            cut, dense, text.train.tokens, text.watch, recipe, loop, state=state, advance=advance
        )
    blocks = SafetensorsWeights(state)
    parts = {name: blocks.load(name) for name in blocks.names()}
    _write(out, cut, joined(parts, cut.shape).items(), course)
    remove(state)
    parameters = sum(one.numel() for one in parts.values())
    return Trained(text, loop, course, round(writing_seconds, 3), parameters, stored_teacher=False)


def _text(
    dense: Checkpoint, recipe: Recovery, wanted: TextWanted, loop: Loop, progress: Progress
) -> TrainingText:
    return training_text(
        recipe.recover_text,
        dense,
        wanted=loop.wanted_windows,
        least=recipe.recover_batch,
        seq_len=wanted.seq_len,
        segment_tokens=wanted.segment_tokens,
        seed=wanted.seed,
        progress=progress,
    )


def _write(out: Path, cut: Checkpoint, tensors: Iterable[tuple[str, torch.Tensor]], course: Course) -> None:
    """Write what was trained to the folder ``out``, or what the cut had where nothing was better."""
    with whole_folder(out) as folder, disk_errors(out):
        kept = SafetensorsWeights(cut.path)  # with fused linears as they are
        written = {
            name: (tensor if course.kept_step else kept.load(name)).to("cpu", kept.dtype(name))
            for name, tensor in tensors
        }
        save_file(written, folder / "model.safetensors", metadata={"format": "pt"})


def _stores_teacher(recipe: Recovery, parameters: int, dense: Checkpoint) -> bool:
    """Whether the dense model's states go to the disk; raises NirvanaError where memory lets neither be."""
    dense_bytes = 4 * (dense.shape.linear_parameters + dense.shape.embedding_parameters)
    training_bytes = (4 + _STATE_BYTES) * parameters
    free_bytes = torch.cuda.mem_get_info()[0] if compute_device().type == "cuda" else free_memory_bytes()
    if recipe.recover_teacher == "auto" and free_bytes >= dense_bytes + training_bytes:
        return False
    if recipe.recover_teacher == "live":
        require_memory(
            dense_bytes + training_bytes,
            what="Recovery, with the dense model, gradients and moments beside the pruned one,",
            hint="Keep the dense model's states on disk: --recover-teacher stored.",
        )
        return False
    require_memory(
        training_bytes,
        what="Recovery, with gradients and moments beside the pruned model,",
        hint="Train adapters alone, --recover-method lora, or block by block, --recover-method layers.",
    )
    return True


def _planned(pruned: StatesOf, dense: Checkpoint | None, recipe: Recovery, wanted: TextWanted) -> Loop:
    """The loop of a budget, as if text cost nothing; ``dense`` is None where its states will be on disk."""

    def seconds(*, seq_len: int) -> float:
        shape, device = pruned.shape, pruned.model.device
        teacher: Teacher = StandIn(pruned, shape.hidden_size) if dense is None else LiveTeacher(dense, device)
        random = torch.Generator().manual_seed(0)
        share = (share_of(recipe.recover_batch), seq_len)
        windows = torch.randint(0, shape.vocab_size, share, generator=random)
        student = Student(pruned, teacher, recipe)
        return _BESIDE * probe(student, windows.to(device), micro_batch=_micro_batch(recipe))

    return _loop(recipe, wanted, seconds=seconds)


class _SecondsOfStep(Protocol):
    def __call__(self, *, seq_len: int) -> float: ...


def _loop(recipe: Recovery, wanted: TextWanted, *, seconds: _SecondsOfStep) -> Loop:
    """The loop of a budget; ``seconds`` measures a step, and is asked where the budget is a time."""
    batch = recipe.recover_batch
    budget = budget_of(recipe.recover or "")
    step_seconds = 1.0 if budget.seconds is None else seconds(seq_len=wanted.seq_len)
    steps = whole_steps(budget.steps(batch * wanted.seq_len, step_seconds))
    return Loop(
        steps=steps,
        wanted_windows=steps * batch,
        step_windows=batch,
        micro_batch=_micro_batch(recipe),
        learning_rate=recipe.learning_rate,
        seed=wanted.seed,
    )


def _micro_batch(recipe: Recovery) -> int:
    """Windows at a time in each process, which must divide its share of a step."""
    share = share_of(recipe.recover_batch)
    micro_batch = min(recipe.recover_micro_batch or share, share)
    while share % micro_batch:
        micro_batch -= 1
    return micro_batch


def _shortened(loop: Loop, recipe: Recovery, seq_len: int, writing_seconds: float) -> Loop:
    """The loop in what writing the text left of a budget in time."""
    budget = budget_of(recipe.recover or "")
    if budget.seconds is None:
        return loop
    step_seconds = budget.seconds / loop.steps
    left = dataclasses.replace(budget, seconds=max(budget.seconds - writing_seconds, 0.0))
    steps = left.steps(loop.step_windows * seq_len, step_seconds)
    return dataclasses.replace(loop, steps=whole_steps(steps))


def _begun(state: Path, identity: dict[str, Any], *, micro_batch: int) -> Loop | None:
    """The loop that a killed run of the same identity was in; another one's state is removed.

    Raises NirvanaError for a folder of that name with files that no training writes.
    """
    ours = (_SCHEDULE, TEACHER, WINDOWS, "checkpoint-*", "layer-*.safetensors", f"{PREFIX}*")
    names = [path.name for path in state.iterdir()] if state.is_dir() else []
    if others := [name for name in names if not any(fnmatchcase(name, one) for one in ours)]:
        raise foreign(state, others)
    try:
        found = json.loads((state / _SCHEDULE).read_text())
        if found["identity"] == identity:
            return Loop(**{**found["loop"], "micro_batch": micro_batch})
    except (OSError, ValueError, KeyError, TypeError):
        pass
    remove(state)
    return None


def _remember(state: Path, identity: dict[str, Any], loop: Loop) -> None:
    state.mkdir(parents=True, exist_ok=True)
    write_json(state / _SCHEDULE, {"identity": identity, "loop": dataclasses.asdict(loop)})
