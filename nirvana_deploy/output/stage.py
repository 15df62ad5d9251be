"""A stage: one step of a run, with what it needs, what it makes and the work between.

``Run.run`` is the only way to run one. A stage is skipped when it is finished and nothing it needs was made
anew; what needs it is forgotten before it runs again. Names of stages stand here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nirvana_deploy.output import layout

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SELECT = "select"
CALIBRATE = "calibrate"
UNIT_COST = "unit-cost"
CURVES = "curves"
SCORE = "score"
PLAN = "plan"
RECONSTRUCT = "reconstruct"
RECOVER = "recover"
CHECKPOINT = "checkpoint"
ONNX = "onnx"
DENSE_ONNX = "dense-onnx"
VERIFY = "verify"
QUALITY = "quality"
ANSWERS = "answers"
BENCHMARK = "benchmark"
WORKLOADS = "workloads"
TANGENT_KERNEL = "ntk"
TASKS = "tasks"
REPORT = "report"
TRITON = "triton"
OPENVINO = "openvino"
SPECULATIVE = "speculative"


def quantized(scheme: str) -> str:
    """The stage that quantizes by ``scheme``, and the folder that it makes."""
    return f"{ONNX}-{scheme}"


def dense_quantized(scheme: str) -> str:
    """The stage that quantizes the dense baseline by ``scheme``."""
    return f"{DENSE_ONNX}-{scheme}"


def engine(name: str) -> str:
    """The stage that builds the engine ``name``."""
    return f"engine-{name}"


def gguf(weight_type: str) -> str:
    """The stage that writes a GGUF file of ``weight_type``."""
    return f"gguf-{weight_type}"


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    needs: tuple[str, ...]
    """Stages whose files or results it reads, where the run has them."""
    makes: tuple[str, ...]
    """Files and folders that ``work`` writes, relative to the output folder."""
    work: Callable[[], Mapping[str, Any] | DataclassInstance | None]
    """Does it, and returns what the manifest remembers: a dataclass of ``results.py``, or a mapping."""
    always: bool = False
    """Never skipped: it is cheap, or what it read has changed."""
    reads: tuple[str, ...] | None = None
    """The options that decide what it makes, beside what it needs; None: any may.

    Where they and what it needs are the same, it is taken from a run beside.
    """
    of: str | None = None
    """The model that it is about, where the folder has several alike."""


@dataclass(frozen=True)
class Step:
    """One of several cuts to the target, each of what recovery made of the one before.

    The last one is what a run in one step is. Those before have stages and a folder of their own, with the
    same files.
    """

    number: int = 1
    of: int = 1

    @property
    def last(self) -> bool:
        """Whether it reaches the target."""
        return self.number == self.of

    def named(self, name: str) -> str:
        """What the stage ``name`` of a run in one step is called here."""
        return name if self.last else f"{name}-{self.number}"

    def folder(self, out: Path) -> Path:
        """Where its files lie in the output folder ``out``."""
        return out if self.last else out / f"{layout.STEP_FOLDERS}{self.number}"

    def stage(self, whole: Stage) -> Stage:
        """A stage of a run in one step as one of this step, which needs the step before."""
        before = (replace(self, number=self.number - 1).named(CHECKPOINT),) if self.number > 1 else ()
        own = {name: self.named(name) for name in (RECONSTRUCT, RECOVER, CHECKPOINT)}
        return replace(
            whole,
            name=own[whole.name],
            needs=(*(own.get(name, name) for name in whole.needs), *before),
            makes=tuple((self.folder(Path()) / name).as_posix() for name in whole.makes),
        )


WHOLE = Step()
"""The cut of a run in one step."""


def in_steps(count: int) -> Iterator[Step]:
    """``count`` steps to the target."""
    return (Step(number, count) for number in range(1, count + 1))
