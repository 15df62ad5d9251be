"""Open a model in a runtime of the table: one interface for all of them.

Each runtime's module is imported when it is asked for, so a missing package is missed by nobody else.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.output.layout import is_checkpoint
from nirvana_deploy.runtime.openvino.ir import refuse_ir
from nirvana_deploy.runtime.runner import Runner
from nirvana_deploy.runtime.table import DEFAULTS, Takes, runtime_named
from nirvana_deploy.runtime.tensorrt.record import ENGINE_SUFFIX, read_engine_record

KINDS: dict[Takes, str] = {
    "engine": "an engine file",
    "checkpoint": "a checkpoint folder",
    "gguf": "a GGUF file",
    "onnx": "an ONNX folder",
}
"""What runtimes take, in words."""
_GGUF_SUFFIX = ".gguf"


def runtime_for(path: Path) -> str:
    """The runtime that runs ``path`` when none is named: an engine's own, else one that takes such a path."""
    if is_engine(path):
        return read_engine_record(path, check_bytes=False).runtime
    return DEFAULTS[kind_of(path)]


def kind_of(path: Path) -> Takes:
    """What ``path`` is; an ONNX folder unless it is seen to be something else."""
    if is_engine(path):
        return "engine"
    if path.suffix == _GGUF_SUFFIX:
        return "gguf"
    return "checkpoint" if is_checkpoint(path) else "onnx"


def is_engine(path: Path) -> bool:
    """Whether ``path`` names an engine file rather than an ONNX folder."""
    return path.suffix == ENGINE_SUFFIX


def open_runner(path: Path, *, runtime: str | None = None, threads: int | None = None) -> Runner:
    """Load an ONNX folder, an engine, a checkpoint or a GGUF file with ``runtime`` [:func:`runtime_for`].

    ``threads`` is the size of the runtime's pool. Raises NirvanaError for an unknown
    runtime, one that does not take such a path, an OpenVINO model, and whatever keeps it from being loaded.
    """
    refuse_ir(path)
    row = runtime_named(runtime if runtime is not None else runtime_for(path))
    if row.takes != kind_of(path):
        build = f"nirvana-deploy build-engine {path} --engine {row.name}"
        raise NirvanaError(
            f"The runtime {row.name} runs {KINDS[row.takes]}, and {path} is none.",
            hint=build if row.takes == "engine" else None,
        )
    module, function = row.opens.split(":")
    opened: Runner = getattr(importlib.import_module(module), function)(
        path, runtime=row.name, threads=threads
    )
    return opened
