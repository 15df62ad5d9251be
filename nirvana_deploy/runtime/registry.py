"""Open a model in a runtime of the table: one interface for all of them.

Each runtime's module is imported when it is asked for, so a missing package is missed by nobody else.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.runtime.runner import Runner
from nirvana_deploy.runtime.table import DEFAULT, runtime_named
from nirvana_deploy.runtime.tensorrt.record import ENGINE_SUFFIX, read_engine_record


def runtime_for(path: Path) -> str:
    """The runtime that runs ``path`` when none is named: an engine's own, ONNX Runtime on the CPU else."""
    return read_engine_record(path, check_bytes=False).runtime if is_engine(path) else DEFAULT


def is_engine(path: Path) -> bool:
    """Whether ``path`` names an engine file rather than an ONNX folder."""
    return path.suffix == ENGINE_SUFFIX


def open_runner(path: Path, *, runtime: str | None = None, threads: int | None = None) -> Runner:
    """Load an ONNX folder or an engine file with ``runtime``, by default :func:`runtime_for`.

    ``threads`` is the size of ONNX Runtime's pool. Raises NirvanaError for an unknown runtime, one that
    does not take such a file, and whatever keeps the file from being loaded.
    """
    row = runtime_named(runtime if runtime is not None else runtime_for(path))
    takes_engines = row.takes == "engine"
    if takes_engines != is_engine(path):
        wanted = "an engine file" if takes_engines else "an ONNX folder"
        raise NirvanaError(
            f"The runtime {row.name} runs {wanted}, and {path} is none.",
            hint=f"nirvana-deploy build-engine {path} --engine {row.name}" if takes_engines else None,
        )
    module, function = row.opens.split(":")
    opened: Runner = getattr(importlib.import_module(module), function)(
        path, runtime=row.name, threads=threads
    )
    return opened
