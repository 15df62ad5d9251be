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
