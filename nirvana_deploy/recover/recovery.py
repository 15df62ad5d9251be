"""From a cut to trained tensors: text, one of two ways to train, and what is kept of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from nirvana_deploy.base.artifact import whole_folder, write_json
from nirvana_deploy.base.ownership.marker import foreign
from nirvana_deploy.base.ownership.temporary import PREFIX, remove
from nirvana_deploy.base.progress import Progress
from nirvana_deploy.base.resources import disk_errors
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.weights import SafetensorsWeights
from nirvana_deploy.quantize.graph.linears import RECORD_FILE
from nirvana_deploy.quantize.schemes import scheme_named
from nirvana_deploy.recover.before import work_of
from nirvana_deploy.recover.data import TrainingText, training_text
from nirvana_deploy.recover.layers import BlockByBlock
from nirvana_deploy.recover.learning.int8_decision import write_decision
from nirvana_deploy.recover.learning.logs import LOG_FOLDER, keep_log
from nirvana_deploy.recover.learning.needs import require_room, stores_teacher
from nirvana_deploy.recover.learning.student import NotFiniteError
from nirvana_deploy.recover.loop import Course, Loop, planned, shortened
from nirvana_deploy.recover.recipe import Recovery
from nirvana_deploy.recover.shared import TEACHER, WINDOWS, WholeModel

_SCHEDULE = "schedule.json"


class Way(Protocol):
    """How a cut is trained."""

    stored_teacher: bool
    trained_parameters: int

    def seconds_of_step(self, seq_len: int) -> float:
        """Measure a step on random windows of ``seq_len`` tokens."""

    def make_ready(self, text: TrainingText, progress: Progress) -> None:
        """Do what a budget in time counts beside the steps."""

    def train(self, text: TrainingText, loop: Loop, progress: Progress) -> Course:
        """Train; raises NirvanaError for a loss that is not finite, and a full disk."""

    def trained_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """(name in the checkpoint, tensor) of all that training may have changed."""


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
    calibration: NDArray[np.int64],
    progress: Progress,
) -> Trained:
    """Train ``cut`` toward ``dense``; write what changed to the folder ``out``, in the stored dtypes.

    ``state`` is where a killed training left its course; it is gone on with where ``identity`` (options and
    hashes, JSON) is the same, and removed in the end. The ``calibration`` windows [N, T] tell the ranges of
    activations to a scheme that rounds them. Raises NirvanaError for too little text, time, memory or disk,
    and for a loss that is not finite.
    """
    kept = cut.shape.linear_parameters / dense.shape.linear_parameters
    work = work_of(recipe, dense.shape, kept=kept, seq_len=wanted.seq_len)
    require_room(work, state.parent)
    begun = _begun(state, identity, micro_batch=work.micro_batch)
    if recipe.recover_for is not None and scheme_named(recipe.recover_for).activation_bits is not None:
        write_decision(cut, calibration, state, scheme=recipe.recover_for, progress=progress)
    way: Way = (
        BlockByBlock(cut, dense, recipe, state)
        if recipe.recover_method == "layers"
        else WholeModel(cut, dense, recipe, state, stored_teacher=stores_teacher(work))
    )
    seq_len = wanted.seq_len
    loop = begun or planned(recipe, seq_len=seq_len, seed=wanted.seed, seconds_of_step=way.seconds_of_step)
    started = time.perf_counter()
    text = training_text(
        recipe.recover_text,
        dense,
        wanted=loop.wanted_windows,
        least=recipe.recover_batch,
        seq_len=seq_len,
        segment_tokens=wanted.segment_tokens,
        seed=wanted.seed,
        progress=progress,
    )
    way.make_ready(text, progress)
    writing_seconds = round(time.perf_counter() - started, 3)
    if begun is None:
        loop = shortened(loop, recipe, seq_len=seq_len, writing_seconds=writing_seconds)
        _remember(state, identity, loop)
    try:
        course = way.train(text, loop, progress)
    except NotFiniteError:  # what is saved is no better than the cut
        remove(state)
        raise
    _write(out, cut, way.trained_tensors(), course, state)
    remove(state)
    return Trained(text, loop, course, writing_seconds, way.trained_parameters, way.stored_teacher)


def _write(
    out: Path, cut: Checkpoint, tensors: Iterable[tuple[str, torch.Tensor]], course: Course, state: Path
) -> None:
    """Write what was trained to the folder ``out``, or what the cut had where nothing was better."""
    with whole_folder(out) as folder, disk_errors(out):
        kept = SafetensorsWeights(cut.path)  # with fused linears as they are
        written = {
            name: (tensor if course.kept_step else kept.load(name)).to("cpu", kept.dtype(name))
            for name, tensor in tensors
        }
        save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
        if (state / RECORD_FILE).is_file():
            shutil.copyfile(state / RECORD_FILE, folder / RECORD_FILE)
        keep_log(state, folder)


def _begun(state: Path, identity: dict[str, Any], *, micro_batch: int) -> Loop | None:
    """The loop that a killed run of the same identity was in; another one's state is removed.

    Raises NirvanaError for a folder of that name with files that no training writes.
    """
    ours = (
        _SCHEDULE,
        TEACHER,
        WINDOWS,
        RECORD_FILE,
        LOG_FOLDER,
        "checkpoint-*",
        "layer-*.safetensors",
        f"{PREFIX}*",
    )
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
