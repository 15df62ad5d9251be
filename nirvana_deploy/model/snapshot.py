"""Snapshots of the hub's cache: folders named by a hash, whose files are links to the repository's blobs."""

from __future__ import annotations

from pathlib import Path

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
_OWNERS = "--"


def lies_within(path: Path, folder: Path) -> bool:
    """Whether ``path``, links followed, is in ``folder``, or among the blobs that a snapshot links to."""
    real, home = path.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return True
    return home.parent.name == _SNAPSHOTS and real.is_relative_to(home.parent.parent / _BLOBS)


def name_of(folder: Path) -> str:
    """The name of a model's folder; of a snapshot the model's, which its cache folder is called after."""
    if folder.parent.name != _SNAPSHOTS:
        return folder.name
    return folder.parent.parent.name.rpartition(_OWNERS)[2] or folder.name


def hub_id_of(folder: Path) -> str | None:
    """The hub id of a snapshot; None for any other folder."""
    kind, _, owner_and_name = folder.parent.parent.name.partition(_OWNERS)
    if folder.parent.name != _SNAPSHOTS or kind != "models":
        return None
    return owner_and_name.replace(_OWNERS, "/", 1) if _OWNERS in owner_and_name else None
