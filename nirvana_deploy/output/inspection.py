"""What ``inspect`` tells of an output folder: what was kept and where, sizes, stages, verification."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import files_under
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.shown.html import html_table
from nirvana_deploy.output.layout import PLAN_FILE
from nirvana_deploy.output.records import (
    LayerWidth,
    Records,
    Verification,
    layer_widths,
    listed_files,
    model_name,
    read_record,
    read_records,
    verifications,
)


@dataclass(frozen=True)
class Inspection:
    """Everything ``inspect`` says about an output folder or a plan."""

    path: str
    model: str | None
    plan: dict[str, Any]
    """The plan without its layers: sparsity, gamma, saliency, budget, calibration; empty without a plan."""
    layers: tuple[LayerWidth, ...]
    stages: dict[str, dict[str, Any]]
    """Per stage that ran: ``seconds`` and ``peak_rss_bytes``."""
    verification: tuple[Verification, ...]
    folder_bytes: dict[str, int]
    """Bytes on disk of each folder of artifacts, relative to ``path``; "." is the folder itself."""
    missing_files: tuple[str, ...]
    """Files the manifest lists that are not on disk."""

    def __repr__(self) -> str:
        return (
            f"Inspection({self.path!r}, {self.model or 'no model'}, {len(self.layers)} layers, "
            f"{len(self.stages)} stages)"
        )

    def _repr_html_(self) -> str:
        """What was kept of each layer, for a notebook."""
        rows = [
            (
                one.label,
                f"{len(one.kept_groups):,} of {one.of_groups:,}",
                f"{one.kept_neurons:,} of {one.of_neurons:,}" if one.of_neurons else "",
            )
            for one in self.layers
        ]
        return html_table(["Layer", "KV groups", "FFN neurons"], rows, title=repr(self))

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def _folder_bytes(out: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path in files_under(out):
        folder = path.parent.relative_to(out).as_posix()
        sizes[folder] = sizes.get(folder, 0) + path.stat().st_size
    return sizes


def inspect_path(path: Path | str) -> Inspection:
    """Describe an output folder, or a plan.json alone.

    Raises NirvanaError when ``path`` does not exist, is no output folder, or holds a broken record.
    """
    path = Path(path)
    if not path.exists():
        raise NirvanaError(f"{path} does not exist.", hint="Give an output folder or a plan.json.")
    is_folder = path.is_dir()
    records = read_records(path) if is_folder else Records(None, read_record(path, PLAN_FILE), None)
    plan = records.plan or {}
    stages = ((records.manifest or {}).get("stages") or {}).items()
    return Inspection(
        path=str(path),
        model=model_name(records),
        plan={key: value for key, value in plan.items() if key != "layers"},
        layers=layer_widths(plan) if plan else (),
        stages={
            name: {key: stage.get(key) for key in ("seconds", "peak_rss_bytes")} for name, stage in stages
        },
        verification=verifications(records),
        folder_bytes=_folder_bytes(path) if is_folder else {},
        missing_files=tuple(name for name in listed_files(records) if not (path / name).is_file())
        if is_folder
        else (),
    )
