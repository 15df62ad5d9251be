"""Open a model in a runtime of the table: one interface for all of them.

Each runtime's module is imported when it is asked for, so a missing package is missed by nobody else.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.output.layout import is_checkpoint
from nirvana_deploy.runtime.runner import Runner
from nirvana_deploy.runtime.table import DEFAULTS, Takes, runtime_named
from nirvana_deploy.runtime.tensorrt.record import ENGINE_SUFFIX, read_engine_record

_WANTED = {"engine": "an engine file", "checkpoint": "a checkpoint folder", "onnx": "an ONNX folder"}


def runtime_for(path: Path) -> str:
    """The runtime that runs ``path`` when none is named: an engine's own, else one that takes such a path."""
    if is_engine(path):
        return read_engine_record(path, check_bytes=False).runtime
    return DEFAULTS[_kind(path)]


def _kind(path: Path) -> Takes:
    """What ``path`` is; an ONNX folder unless it is seen to be something else."""
    if is_engine(path):
        return "engine"
    return "checkpoint" if is_checkpoint(path) else "onnx"


def is_engine(path: Path) -> bool:
    """Whether ``path`` names an engine file rather than an ONNX folder."""
    return path.suffix == ENGINE_SUFFIX


def open_runner(path: Path, *, runtime: str | None = None, threads: int | None = None) -> Runner:
    """Load an ONNX folder, an engine file or a checkpoint with ``runtime``, by default :func:`runtime_for`.

    ``threads`` is the size of the pool of ONNX Runtime, or of torch. Raises NirvanaError for an unknown
    runtime, one that does not take such a path, and whatever keeps it from being loaded.
    """
    row = runtime_named(runtime if runtime is not None else runtime_for(path))
    if row.takes != _kind(path):
        build = f"nirvana-deploy build-engine {path} --engine {row.name}"
        raise NirvanaError(
            f"The runtime {row.name} runs {_WANTED[row.takes]}, and {path} is none.",
            hint=build if row.takes == "engine" else None,
        )
    module, function = row.opens.split(":")
    opened: Runner = getattr(importlib.import_module(module), function)(
        path, runtime=row.name, threads=threads
    )
    return opened
