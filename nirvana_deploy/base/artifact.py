"""Artifacts that appear whole or not at all.

A file is written under a temporary name in its final folder, flushed to disk and renamed into place; what
stood there comes back when that fails. The manifest is written after the files it lists, so a file that it
doesn't list, or lists with another sha256, was never finished.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nirvana_deploy.base.ownership.marker import (
    CARD,
    MARKER,
    foreign,
    marked_names,
    marker_text,
    real,
    require_ours,
)
from nirvana_deploy.base.ownership.temporary import is_temporary, remove, remove_abandoned, temporary_beside
from nirvana_deploy.base.resources import disk_errors

_CHUNK_BYTES = 1 << 22


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_OPENS_FOLDERS = hasattr(os, "O_DIRECTORY")
"""Windows does not, so their entries cannot be flushed; and it flushes what was opened to write alone."""


def _fsync(path: Path) -> None:
    if not _OPENS_FOLDERS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if _OPENS_FOLDERS else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = temporary_beside(path)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            remove(partial)
        _fsync(path.parent)


@contextmanager
def whole_file(target: Path, *, elsewhere: str = "choose another place with --out FILE") -> Iterator[Path]:
    """Yield a temporary name beside ``target``, renamed to it on success and removed on failure.

    Whether ``target`` may be replaced is the caller's question.
    """
    with disk_errors(target, elsewhere=elsewhere):
        place = real(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(place.parent, place.name)
        partial = temporary_beside(place)
        try:
            yield partial
            _fsync(partial)
            _put(partial, place)
        finally:
            remove(partial)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON with a stable layout (same value, same bytes), whole or not at all.

    A number that is not finite, which JSON has not, is null.
    """
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    # the bytes of a file's name that are not UTF-8 are written as JSON escapes them
    write_bytes(path, f"{text}\n".encode(errors="backslashreplace"))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def whole_folder(target: Path, *, elsewhere: str = "choose another place with --out DIR") -> Iterator[Path]:
    """Yield a temporary folder beside ``target``, renamed to it on success and removed on failure.

    It gets a marker, by which it may be replaced later. An existing ``target`` is replaced only at the very
    end. Raises NirvanaError, before the block runs or at its end, if ``target`` holds what is not ours.
    """
    with disk_errors(target, elsewhere=elsewhere):
        place = real(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(place.parent, place.name)
        require_ours(place)
        partial = temporary_beside(place)
        try:
            partial.mkdir()
            yield partial
            _mark(partial)
            readable = partial.stat().st_mode & 0o666  # by the user's umask; some writers are stricter
            for path in sorted(partial.rglob("*")):
                if path.is_file():
                    path.chmod(readable)
                _fsync(path)
            _fsync(partial)
            require_ours(place)
            _put(partial, place)
        finally:
            remove(partial)


def _put(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``; what stood there is removed, or comes back if that fails."""
    old = temporary_beside(target, kind="old")
    try:
        _move_aside(target, old)
        partial.replace(target)
        _fsync(target.parent)
    except BaseException:
        if os.path.lexists(old):
            if target.is_dir():
                remove(target)
            old.replace(target)
            remove(old)  # two names of one file are left as they are by replace()
        raise
    remove(old)


def _move_aside(target: Path, old: Path) -> None:
    """Let ``old`` be what ``target`` is; a file keeps its own name too: there is one at any moment."""
    if target.is_dir():
        target.replace(old)
        return
    with suppress(OSError):  # none there, or a file system without links
        os.link(target, old)


def _mark(folder: Path) -> None:
    marker = folder / MARKER
    files = (path for path in folder.rglob("*") if not path.is_dir() and path != marker)
    marker.write_text(marker_text(path.relative_to(folder).as_posix() for path in files), encoding="utf-8")


def claim(folder: Path, names: Iterable[str]) -> None:
    """Mark ``names`` in ``folder`` as this tool's, before they are written.

    Raises NirvanaError if one of them is there and somebody else's.
    """
    ours, names = marked_names(folder), list(names)
    others = [name for name in (*names, MARKER) if os.path.lexists(folder / name) and name not in ours]
    if others:
        raise foreign(folder / others[0], others)
    write_bytes(folder / MARKER, marker_text(ours.union(names) - {MARKER}).encode())


def unclaim(folder: Path) -> None:
    """Take from the marker of ``folder`` what was claimed and not written; a marker of nothing goes."""
    there = {name for name in marked_names(folder) - {MARKER} if os.path.lexists(folder / name)}
    if there:
        write_bytes(folder / MARKER, marker_text(there).encode())
    else:
        remove(folder / MARKER)


def take(source: Path, target: Path) -> None:
    """Give ``target`` what ``source`` holds, a file or a folder, whole; by links where there can be any."""
    if source.is_dir():
        with whole_folder(target) as folder:
            for file in files_under(source):
                place = folder / file.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                link(file, place)
    else:
        with whole_file(target) as partial:
            link(source, partial)


def link(source: Path, target: Path) -> None:
    """Let ``target`` be a second name of the file ``source`` where there can be one, else a copy of it.

    Nobody changes a file of this tool: it is replaced.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def files_under(path: Path) -> list[Path]:
    """Return the finished files under a folder, sorted, or ``[path]`` for a file.

    Markers and the folder's card are no part of what was made.
    """
    if path.is_file():
        return [path]
    others = (file for file in path.rglob("*") if file.is_file() and file.name != MARKER)
    found = (file for file in others if file != path / CARD)
    return sorted(file for file in found if not is_temporary(file.relative_to(path)))
