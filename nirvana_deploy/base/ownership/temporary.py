"""Temporaries that tell whose they are: ``.partial-HOST.PID.START.RANDOM.KIND-NAME``.

HOST stands for the machine and its process namespace, START for the second in which the process began. A
temporary is removed by the process that made it, or by any other once that one is gone. KIND is ``new`` for
what is being written, and ``old`` for what moved aside meanwhile and comes back if nothing took its place.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Literal

PREFIX = ".partial-"
_NAME = re.compile(
    re.escape(PREFIX) + r"(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.(?P<start>\d+)\.[0-9a-f]{8}\."
    r"(?P<kind>new|old)-(?P<name>.+)",
    re.DOTALL,
)
_CLOCK_SECONDS = 60
"""How far two readings of a process's start may lie apart: the system's clock is set now and then."""


def temporary_beside(target: Path, *, kind: Literal["new", "old"] = "new") -> Path:
    """A name beside ``target`` that nobody else has."""
    return target.with_name(f"{PREFIX}{_owner(os.getpid())}.{secrets.token_hex(4)}.{kind}-{target.name}")


def is_temporary(path: Path) -> bool:
    """Whether a relative path is a temporary, or lies in one."""
    return any(part.startswith(PREFIX) for part in path.parts)


def is_abandoned(name: str) -> bool:
    """Whether ``name`` is that of a temporary whose process is gone."""
    found = _NAME.fullmatch(name)
    return (
        found is not None and found["host"] == _host() and not _runs(int(found["pid"]), int(found["start"]))
    )


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove the temporaries in ``folder`` [only those of ``name``] whose processes are gone.

    What a process moved aside and put nothing in the place of goes back there.
    """
    for path in sorted(folder.glob(f"{PREFIX}*")):
        found = _NAME.fullmatch(path.name)
        if found is None or name not in (None, found["name"]) or not is_abandoned(path.name):
            continue
        target = path.with_name(found["name"])
        if found["kind"] == "old" and not os.path.lexists(target):
            with suppress(OSError):
                path.rename(target)
        else:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; what cannot be removed stays.

    An interrupt meanwhile is raised when all is gone: what was begun has no other to finish it.
    """
    try:
        _remove(path)
    except KeyboardInterrupt:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in ``parent`` for as long as the block runs."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent, "scratch")
    folder = temporary_beside(parent / "scratch")
    try:
        folder.mkdir()
        yield folder
    finally:
        remove(folder)


@cache
def _owner(pid: int) -> str:
    import psutil

    return f"{_host()}.{pid}.{int(psutil.Process(pid).create_time())}"


@cache
def _host() -> str:
    """Machine and process namespace: outside them a process id says nothing."""
    namespace = Path("/proc/self/ns/pid")
    inode = namespace.stat().st_ino if namespace.exists() else 0
    return hashlib.sha256(f"{socket.gethostname()} {inode}".encode()).hexdigest()[:8]


def _runs(pid: int, start: int) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - start) <= _CLOCK_SECONDS
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # somebody else's: it is there
        return True
