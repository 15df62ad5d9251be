"""A stage: one step of a run, with what it needs, what it makes and the work between.

``Run.run`` is the only way to run one. A stage is skipped when it is finished and nothing it needs was made
anew; what needs it is forgotten before it runs again. Names of stages stand here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
TANGENT_KERNEL = "ntk"
TASKS = "tasks"
REPORT = "report"
TRITON = "triton"


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
    shared: bool = False
    """Comes out the same at every sparsity: a run beside may have made it."""
