"""One path that is timed against others: what it is, what runs it, and whether that is installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.output.layout import holds_model, is_checkpoint
from nirvana_deploy.runtime.openvino.ir import refuse_ir
from nirvana_deploy.runtime.registry import kind_of, runtime_for
from nirvana_deploy.runtime.table import Runtime, runtime_named


@dataclass(frozen=True)
class Contender:
    """One model in one runtime."""

    name: str
    """As tables show it."""
    path: Path
    """ONNX folder, checkpoint folder, engine or GGUF file."""
    runtime: str
    """A name of ``runtime/table.py``."""

    @property
    def row(self) -> Runtime:
        """Its runtime's row of the table."""
        return runtime_named(self.runtime)

    @property
    def runtime_version(self) -> str | None:
        """Of the installed package; None where another package provides the module."""
        try:
            return version(self.row.distribution)
        except PackageNotFoundError:
            return None


def runtime_of(path: Path, wanted: str | None) -> str:
    """``wanted`` where it takes a path of this kind, else what runs such a path where none is named."""
    if wanted is not None and runtime_named(wanted).takes == kind_of(path):
        return wanted
    return runtime_for(path)


def require_model(path: Path) -> None:
    """Raise NirvanaError for a path that no runtime takes."""
    refuse_ir(path)
    if path.suffix == ".onnx" and path.is_file():
        raise NirvanaError(
            f"{path} is the graph alone; a model is timed by its folder.", hint=f"Name {path.parent}"
        )
    known = holds_model(path) or is_checkpoint(path) if path.is_dir() else kind_of(path) != "onnx"
    if not known:
        raise NirvanaError(
            f"{path} is nothing that can be timed: no output folder (manifest.json), ONNX folder "
            "(model.onnx), checkpoint (config.json), engine (.engine) or GGUF file (.gguf).",
            hint="Make one: nirvana-deploy export MODEL --out DIR",
        )


def require_runtime(contender: Contender) -> None:
    """Raise NirvanaError, with the pip command, where the runtime of a contender is not installed."""
    row = contender.row
    if find_spec(row.module) is not None:
        return
    what = f"Timing {contender.name}"
    if row.extra is not None:
        raise MissingExtraError(what, package=row.distribution, extra=row.extra)
    raise NirvanaError(
        f"{what} needs the package {row.distribution!r}, which is not installed.", hint=row.install
    )
