"""What Windows lacks and refuses, taken from this process; import it in one that is for nothing else.

A stand-in: it shows what a program must not need. How Windows does the rest, only Windows tells.
"""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

MISSING_MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty")
_MISSING_IN_OS = (
    *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC"),
    *("fork", "forkpty", "geteuid", "getloadavg", "killpg", "mkfifo", "posix_fadvise", "pread", "pwrite"),
    *("sched_getaffinity", "sched_setaffinity", "setsid"),
)
_MISSING_SIGNALS = ("SIGALRM", "SIGHUP", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""SIGKILL stays: it is what ``Popen.kill`` sends here."""
_BEYOND_BYTES = 1 << 30


def package_modules() -> list[str]:
    """Every module of the package but ``__main__``, which runs."""
    folders = {
        name: Path(importlib.import_module(name).__path__[0])
        for name in ("nirvana_deploy", "nirvana_deploy.cli", "nirvana_deploy.calib_sets")
    }
    names = {
        ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
        for package, folder in folders.items()
        for path in folder.rglob("*.py")
    }
    return sorted(names - {"nirvana_deploy.__main__"})


def pretend(*, already: Iterable[str]) -> None:
    """Be without what is Unix's own from here on; the modules ``already`` are not ours and know both."""
    for name in already:
        importlib.import_module(name)
    _offer_locks()
    for name in MISSING_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in _MISSING_IN_OS:
        if hasattr(os, name):
            delattr(os, name)
    for name in _MISSING_SIGNALS:
        delattr(signal, name)
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[assignment]  # as it is there
    os.open = _refusing_folders(os.open)
    for name in ("remove", "rename", "replace", "unlink"):
        setattr(os, name, _refusing_open_files(getattr(os, name)))


def _offer_locks() -> None:
    """A ``msvcrt`` that locks whole files, as long as it is asked for a part that nobody reads."""
    import fcntl

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) >= _BEYOND_BYTES, "what is locked cannot be read"
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    module: Any = ModuleType("msvcrt")
    module.LK_NBLCK, module.locking = 2, locking
    sys.modules["msvcrt"] = module


def _refusing_folders(call: Callable[..., int]) -> Callable[..., int]:
    def opened(path: Any, *more: Any, **how: Any) -> int:
        if not isinstance(path, int) and Path(os.fsdecode(path)).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))
        return call(path, *more, **how)

    return opened


def _refusing_open_files(call: Callable[..., None]) -> Callable[..., None]:
    def called(*paths: Any, **how: Any) -> None:
        for path in paths:
            if held := _held_in(Path(os.fsdecode(path)).absolute()):
                raise PermissionError(errno.EACCES, f"{held} is open", os.fsdecode(path))
        call(*paths, **how)

    return called


def _held_in(place: Path) -> str | None:
    """A file that this process has open or mapped, and that is ``place`` or lies in it."""
    held = []
    for one in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            held.append(str(one.readlink()))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    held += [f"/{line.partition('/')[2]}" for line in maps if "/" in line]
    return next((one for one in held if Path(one) == place or Path(one).is_relative_to(place)), None)
