"""What a job is going to take, before any work: stages, sizes, memory and minutes.

Sizes follow from the model's shape. Minutes are operations counted and bytes read, over what this machine
reaches in a moment's probe; a count leaves out what is no product, so a range is told. How far recorded runs
were off stands in ``benchmarks/NOTES.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nirvana_deploy.base.machine import read_bandwidth_gb_per_s
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import free_disk_bytes, free_memory_bytes
from nirvana_deploy.model.checkpoint import Checkpoint, model_record
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import MANIFEST
from nirvana_deploy.output.run import Run, require_free
from nirvana_deploy.pipeline.before import (
    Until,
    checked,
    may_change,
    measured_anew,
    recorded_options,
    require_enough_memory,
    require_room_to_recover,
    require_space,
    within_context,
)
from nirvana_deploy.pipeline.forecast.costs import Cost, Costs
from nirvana_deploy.pipeline.forecast.stages import stages_of
from nirvana_deploy.pipeline.given_curves import GivenCurves
from nirvana_deploy.pipeline.job import Job
from nirvana_deploy.prune.choosing.choices import Choices
from nirvana_deploy.prune.curves.operations import operations_per_second

LEAST, MOST = 0.7, 2.0
"""Recorded seconds lie between these many times the counted ones."""
_WRITTEN_PER_S = 1.5e8
"""Bytes that are made, hashed and written in a second."""


@dataclass(frozen=True)
class Speed:
    """What this machine reaches now."""

    operations_per_s: float
    """Of float32 products."""
    read_bytes_per_s: float

    def seconds(self, cost: Cost) -> float:
        """How long something takes."""
        return (
            cost.seconds
            + cost.operations / self.operations_per_s
            + cost.read_bytes / self.read_bytes_per_s
            + cost.written_bytes / _WRITTEN_PER_S
        )


@dataclass(frozen=True)
class StageForecast:
    """One stage."""

    name: str
    seconds: float
    """As counted."""
    written_bytes: float
    memory_bytes: float
    finished: bool = False
    """Whether it is skipped, being finished: it costs nothing then."""


@dataclass(frozen=True)
class Forecast:
    """A job, and what it is going to take."""

    model: str
    parameters: int
    sparsity: float
    out: Path
    stages: tuple[StageForecast, ...]
    spilled_bytes: float
    """Files on the way that go again."""
    free_disk_bytes: int
    free_memory_bytes: int
    speed: Speed

    @property
    def left(self) -> tuple[StageForecast, ...]:
        """The stages that are going to run."""
        return tuple(one for one in self.stages if not one.finished)

    @property
    def seconds(self) -> tuple[float, float]:
        """From, to."""
        counted = sum(one.seconds for one in self.left)
        return LEAST * counted, MOST * counted

    @property
    def written_bytes(self) -> float:
        """What is written and stays."""
        return sum(one.written_bytes for one in self.left)

    @property
    def largest(self) -> StageForecast | None:
        """The stage that takes the most memory, if any runs."""
        return max(self.left, key=lambda one: one.memory_bytes, default=None)

    def to_json(self) -> dict[str, Any]:
        """For machines; sizes in bytes."""
        largest = self.largest
        return {
            "model": self.model,
            "parameters": self.parameters,
            "sparsity": self.sparsity,
            "out": str(self.out),
            "stages": [vars(one) for one in self.stages],
            "seconds_least": self.seconds[0],
            "seconds_most": self.seconds[1],
            "written_bytes": self.written_bytes,
            "spilled_bytes": self.spilled_bytes,
            "free_disk_bytes": self.free_disk_bytes,
            "peak_memory_bytes": largest.memory_bytes if largest else 0,
            "free_memory_bytes": self.free_memory_bytes,
            **vars(self.speed),
        }


@dataclass(frozen=True)
class Planned:
    """A job that may be run, and the forecast of it."""

    forecast: Forecast
    _job: Job
    _choices: Choices
    _dense: Checkpoint
    _until: Until
    _resume: bool

    def require_room(self) -> None:
        """Raise NirvanaError where the job would be refused for lack of disk or memory."""
        require_space(self._job, self.forecast.out, self._dense.shape, self._until)
        if not self._resume:
            require_enough_memory(self._job, self._choices, self._dense.shape, self._until)
        if any(one.name.startswith(stage.RECOVER) for one in self.forecast.left):
            require_room_to_recover(self._job, self.forecast.out, self._dense.shape)


def forecast(
    job: Job,
    *,
    out: Path | None = None,
    until: Until = "report",
    resume: bool = False,
    force: bool = False,
    again: Sequence[str] = (),
    curves: GivenCurves | None = None,
    speed: Speed | None = None,
    progress: Progress = SILENT,
) -> Planned:
    """What ``run_job`` with the same arguments is going to do; writes nothing.

    Stages in ``again`` run although they are finished. ``speed`` saves the probe, which takes a second or
    two. Raises NirvanaError for what ``run_job`` refuses before any work, lack of room apart.
    """
    source = resolve_model(job.model, progress=progress)
    dense = Checkpoint.open(source.path)
    job = within_context(job, dense)
    choices = checked(job, dense, until, progress)
    if curves is not None:
        curves.require_serves(job, choices, dense)
    out = out if out is not None else Path(f"{source.name}-s{job.pruning.sparsity:g}")
    require_free(out, resume=resume, force=force)
    finished: frozenset[str] = frozenset()
    names = stages_of(job, choices, until)
    if resume and (out / MANIFEST).is_file():
        run = Run.open(out)
        options = recorded_options(job, choices, dense.shape, until)
        run.require_same(options, model_record(source), may_change())
        finished = _finished(run, names, (*again, *measured_anew(run.differing(options))))
    if curves is not None:
        finished |= {stage.CURVES}
    costs = Costs(job, choices, dense)
    speed = speed or probed()
    found = [_stage(name, costs.of(name), speed, name in finished) for name in names]
    spilled = max((costs.of(name).spilled_bytes for name in names if name not in finished), default=0.0)
    told = Forecast(
        model=source.name,
        parameters=costs.dense.parameters,
        sparsity=job.pruning.sparsity,
        out=out,
        stages=tuple(found),
        spilled_bytes=spilled,
        free_disk_bytes=free_disk_bytes(out.absolute()),
        free_memory_bytes=free_memory_bytes(),
        speed=speed,
    )
    return Planned(told, job, choices, dense, until, resume)


def probed() -> Speed:
    """Products and reads of a moment, on as many threads as torch takes."""
    import torch

    rate = operations_per_second(0.5)
    return Speed(rate, 1e9 * read_bandwidth_gb_per_s(threads=torch.get_num_threads()))


def without(found: Forecast, names: Sequence[str]) -> Forecast:
    """The forecast of a job that takes the stages ``names`` from another one."""
    stages = tuple(replace(one, finished=one.finished or one.name in names) for one in found.stages)
    return replace(found, stages=stages)


def _stage(name: str, cost: Cost, speed: Speed, finished: bool) -> StageForecast:
    return StageForecast(name, speed.seconds(cost), cost.written_bytes, cost.memory_bytes, finished)


def _finished(run: Run, names: Sequence[str], again: Sequence[str]) -> frozenset[str]:
    """The stages that a resumed run skips: finished, and so is all that they were made from."""
    found: set[str] = set()
    cut: set[str] = set()  # refit and training, which the checkpoint behind them needs once the run has them
    for name in names:
        needs = set(run.manifest["stages"].get(name, {}).get("needs", ())).intersection(names)
        if name.startswith(stage.CHECKPOINT):
            needs |= cut
        if name.startswith((stage.RECONSTRUCT, stage.RECOVER)):
            cut.add(name)
        if name not in again and name != stage.REPORT and needs <= found and run.finished(name):
            found.add(name)
    return frozenset(found)
