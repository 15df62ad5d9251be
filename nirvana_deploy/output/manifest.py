"""manifest.json: what a run made, stage by stage, and the questions that it answers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NotRequired, Required, TypedDict, cast

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.marker import TOOL
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.output.layout import MANIFEST
from nirvana_deploy.output.record_kinds import Environment

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCHEMA = 1


class StageRecord(TypedDict):
    """What the manifest says of one finished stage."""

    run: NotRequired[str]
    seconds: NotRequired[float | None]
    cpu_seconds: NotRequired[float | None]
    peak_rss_bytes: NotRequired[int | None]
    needs: NotRequired[list[str]]
    files: dict[str, str]
    """Path relative to the output folder -> sha256."""
    result: dict[str, Any]


class ModelRecord(TypedDict, total=False):
    """The model that a run began with."""

    name: Required[str]
    path: str
    hub_id: str | None
    card: dict[str, str | list[str]]
    files: dict[str, str]


class Manifest(TypedDict, total=False):
    """The content of manifest.json."""

    schema: int
    tool: str
    command: str
    out: str
    """As seen from the working folder, where paths of recipe.toml hold; left out where it is not in it."""
    options: Required[dict[str, Any]]
    model: Required[ModelRecord]
    environment: Environment
    run: str
    complete: bool
    makes: list[str]
    files: dict[str, str]
    stages: Required[dict[str, StageRecord]]


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of an output folder; raises NirvanaError for one that is missing or broken."""
    return cast(dict[str, Any], read_json(out / MANIFEST, Manifest, schema=SCHEMA))


def is_ours(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is one of this tool, and claims names inside its folder alone."""
    return (
        str(manifest.get("tool")).startswith(f"{TOOL} ")
        and {"stages", "files", "run", "makes"} <= manifest.keys()
        and all(_is_inside(name) for name in manifest["makes"])
    )


def our_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a run of this tool; None for anything else under its name."""
    try:
        manifest = read_manifest(out)
    except NirvanaError:
        return None
    return manifest if is_ours(manifest) else None


def seen_from_here(out: Path) -> dict[str, str]:
    """What the manifest says of where the job of the folder ``out`` is typed."""
    try:
        seen = Path(os.path.relpath(out))
    except (OSError, ValueError):  # the working folder is gone, or on another drive
        return {}
    return {} if ".." in seen.parts else {"out": seen.as_posix()}


def listed(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Every file that the manifest knows -> its sha256."""
    stages = manifest["stages"].values()
    own: dict[str, str] = manifest.get("files", {})
    return {**own, **{file: sha256 for stage in stages for file, sha256 in stage["files"].items()}}


def made_from(manifest: Mapping[str, Any], name: str) -> set[str]:
    """The stage ``name`` and all that was made from it, directly or not.

    A manifest that does not say what its stages needed is taken to have needed all that came before.
    """
    names, found = list(manifest["stages"]), {name}
    for position, later in enumerate(names[names.index(name) + 1 :], start=names.index(name) + 1):
        if not found.isdisjoint(manifest["stages"][later].get("needs", names[:position])):
            found.add(later)
    return found


def in_order(stages: Mapping[str, Any], passed: Sequence[str]) -> dict[str, Any]:
    """``stages`` with one that a resumed run added behind those it followed, ahead of what follows it."""
    names = [*passed, *(name for name in stages if name not in passed)]
    return {name: stages[name] for name in names}


def plain(result: Mapping[str, Any] | DataclassInstance | None) -> dict[str, Any]:
    """A result as JSON has it; what a dataclass leaves None by default is left out."""
    if not is_dataclass(result):
        return dict(result or {})
    optional = {field.name for field in fields(result) if field.default is None}
    said = {key: value for key, value in asdict(result).items() if value is not None or key not in optional}
    as_json: dict[str, Any] = json.loads(json.dumps(said))
    return as_json


def failed(result: Mapping[str, Any]) -> bool:
    """Whether a result, or a part of it, says that it did not pass."""
    parts = [result, *(part for part in result.values() if isinstance(part, Mapping))]
    return any(part.get("passed") is False for part in parts)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return path.parts != () and not path.is_absolute() and ".." not in path.parts
