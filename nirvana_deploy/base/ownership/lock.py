"""A lock on an output folder: one command at a time writes there.

The kernel holds it and lets go when the process ends, however it ends. The file says who holds it; it is
removed at the end, and one that a killed process left behind locks nothing.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shlex
import stat
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import unix_module
from nirvana_deploy.base.reading import open_flags, parse_json, typed

_fcntl = unix_module("fcntl")

LOCK = ".nirvana-deploy.lock"
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What file systems say that know no locks; there nobody is kept out."""
_FLAGS = open_flags("O_RDWR", "O_CREAT", "O_NOFOLLOW", "O_NONBLOCK")
_BEYOND_BYTES = 1 << 30
"""What is locked where a locked part of a file cannot be read: one byte, behind all that is written."""
_SHOWN = 200


class _Holder(TypedDict):
    pid: int
    command: str


class FolderLock:
    """The lock of a folder, held from here to :meth:`release`, which is also what ``with`` calls.

    The folder exists, and the lock's file lies in it; for what is written whole, folder or file, it lies
    ``beside``. Raises NirvanaError, which names the process and its command, when another one holds it.
    """

    def __init__(self, folder: Path, *, beside: bool = False) -> None:
        self._folder = folder
        self._path = folder.with_name(f".{folder.name}{LOCK}") if beside else folder / LOCK
        descriptor = self._take()
        self._release = weakref.finalize(self, _let_go, self._path, descriptor, os.getpid())

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let go; the second time does nothing."""
        self._release()

    def _take(self) -> int:
        while True:
            descriptor = _open(self._path)
            try:
                _keep_others_out(descriptor)
            except OSError as error:
                if error.errno not in _WITHOUT_LOCKS:
                    holder = _read(descriptor)
                    os.close(descriptor)
                    raise _held(self._folder, holder) from None
            if _is_at(descriptor, self._path):
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, json.dumps({"pid": os.getpid(), "command": _command()}).encode())
                return descriptor
            os.close(descriptor)  # its holder removed the file between the two calls


def _keep_others_out(descriptor: int) -> None:
    """Lock the open file; raises OSError when it is locked by another open file, of this process or not."""
    if _fcntl is not None:
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        return
    msvcrt = importlib.import_module("msvcrt")  # Windows; tried with a stand-in alone, never there
    os.lseek(descriptor, _BEYOND_BYTES, os.SEEK_SET)
    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


def _open(path: Path) -> int:
    """The lock's file, which this tool wrote or writes: nothing that stands under its name is emptied."""
    try:
        descriptor = os.open(path, _FLAGS, 0o644)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
            raise _no_lock(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_lock(path)
    return descriptor


def _no_lock(path: Path) -> NirvanaError:
    return NirvanaError(
        f"{path} is no file of this tool, which locks the folder with it: it is a folder, a link or a pipe.",
        hint="Move it away.",
    )


def _read(descriptor: int) -> bytes:
    """What the file says; its holder may be about to write it."""
    for _ in range(10):
        os.lseek(descriptor, 0, os.SEEK_SET)
        if holder := os.read(descriptor, 4096):
            return holder
        time.sleep(0.01)
    return b""


def _let_go(path: Path, descriptor: int, owner: int) -> None:
    if _fcntl is None:  # Windows removes no open file, and has no forks
        os.close(descriptor)
        with suppress(OSError):  # another process may have it by now
            path.unlink()
        return
    if os.getpid() == owner:  # and no fork of it
        with suppress(OSError):
            path.unlink()
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _command() -> str:
    """The command line of this process, in the words of a user."""
    program = Path(sys.argv[0] or "python").name
    words = ["nirvana-deploy" if program == "__main__.py" else program, *sys.argv[1:]]
    return shlex.join(words)[:_SHOWN]


def _held(folder: Path, holder: bytes) -> NirvanaError:
    try:
        said = typed(parse_json(holder, LOCK), _Holder, LOCK)
        who = f"process {said['pid']} ({''.join(filter(str.isprintable, said['command']))})"
    except NirvanaError:
        who = "another process"
    return NirvanaError(
        f"{folder} is being written by {who}.",
        hint="Wait until it has finished and repeat the command, or choose another folder.",
    )
