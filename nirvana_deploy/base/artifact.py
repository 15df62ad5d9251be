"""Artifacts that appear whole or not at all.

A file is written under a temporary name in its final folder, flushed to disk and renamed into place. The
manifest is written after the files it lists, so a file that it doesn't list, or lists with another sha256,
was never finished.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError

_PARTIAL = ".partial-"
_CHUNK_BYTES = 1 << 22


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path, *, elsewhere: str = "choose another place with --out DIR") -> Iterator[None]:
    """Turn operating system errors while writing ``path`` into a NirvanaError that names it."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission is denied",
            errno.EPERM: "permission is denied",
            errno.ENOENT: "part of the path does not exist",
            errno.ENOTDIR: "part of the path is a file, not a folder",
        }
        # a bare OSError comes from a writer that wraps the system's; others (of a network, say) are not ours
        if error.errno not in reasons and type(error) is not OSError:
            raise
        reason = reasons.get(error.errno or 0) or error.strerror or str(error)
        raise NirvanaError(
            f"Cannot write {path}: {reason}.",
            hint=f"Free some space, or {elsewhere}.",
        ) from error


def require_free_bytes(path: Path, needed_bytes: int, *, what: str) -> None:
    """Raise NirvanaError if the disk of ``path`` has less than ``needed_bytes`` free."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise NirvanaError(
            f"{what} needs about {needed_bytes / 1e9:.1f} GB on the disk of {path}, "
            f"which has {free_bytes / 1e9:.1f} GB free.",
            hint="Free some space, or choose another place with --out DIR.",
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{_PARTIAL}{os.getpid()}-{path.name}")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _fsync(path.parent)


@contextmanager
def whole_file(target: Path, *, elsewhere: str = "choose another place with --out FILE") -> Iterator[Path]:
    """Yield a temporary name beside ``target``, renamed to it on success and removed on failure."""
    with disk_errors(target, elsewhere=elsewhere):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{_PARTIAL}{os.getpid()}-{target.name}")
        try:
            yield partial
            _fsync(partial)
            partial.replace(target)
            _fsync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON with a stable layout (same value, same bytes), whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises NirvanaError when it is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NirvanaError(f"{path} does not exist.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise NirvanaError(f"{path} is not valid JSON: {error}.") from error


@contextmanager
def whole_folder(target: Path, *, elsewhere: str = "choose another place with --out DIR") -> Iterator[Path]:
    """Yield a temporary folder beside ``target``, renamed to it on success and removed on failure.

    An existing ``target`` is replaced only at the very end.
    """
    with disk_errors(target, elsewhere=elsewhere):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{_PARTIAL}{os.getpid()}-{target.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            readable = partial.stat().st_mode & 0o666  # by the user's umask; some writers are stricter
            for path in sorted(partial.rglob("*")):
                if path.is_file():
                    path.chmod(readable)
                _fsync(path)
            _fsync(partial)
            if target.exists():
                old = target.with_name(f"{_PARTIAL}{os.getpid()}-old-{target.name}")
                target.replace(old)
                partial.replace(target)
                shutil.rmtree(old)
            else:
                partial.replace(target)
            _fsync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def remove_partials(folder: Path) -> None:
    """Delete temporary files of killed runs in ``folder`` and one level below."""
    for pattern in (f"{_PARTIAL}*", f"*/{_PARTIAL}*"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def files_under(path: Path) -> list[Path]:
    """Return the finished files under a folder, sorted, or ``[path]`` for a file."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and _PARTIAL not in str(p.relative_to(path)))
