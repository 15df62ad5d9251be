"""Disk and memory: what a step needs is compared with what is free, and running out of it is a sentence."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import address_space_limit_bytes
from nirvana_deploy.base.units import format_bytes

_DISK_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or a limit of this process allows",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports an error",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOENT: "part of the path does not exist",
    errno.ENOTDIR: "part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links lead in a circle",
}
_USED_UP = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk without room, whichever file is written."""
_TORCH_WRITES_NO_MORE = ("pytorchstreamwriter failed", "unexpected pos")
"""torch.save of a file that does not get all its bytes; it does not tell why."""
_MEMORY_SIGNS = (
    "bad_alloc",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "not enough memory",
    "out of memory",
    "outofmemory",
)
_LESS_MEMORY = (
    "End other programs, or take less: fewer or shorter windows (--num-sequences, --seq-len), a smaller "
    "--micro-batch or batch, a smaller model."
)


@contextmanager
def disk_errors(path: Path, *, elsewhere: str = "choose another place with --out DIR") -> Iterator[None]:
    """Turn operating system errors while writing ``path`` into a NirvanaError that names it."""
    try:
        yield
    except NirvanaError:
        raise
    except Exception as error:
        number = _number_of(error)
        # a bare OSError comes from a writer that wraps the system's; others (of a network, say) are not ours
        if number not in _DISK_REASONS and type(error) is not OSError:
            raise
        reason = _DISK_REASONS.get(number or 0) or getattr(error, "strerror", None) or str(error)
        if (other := _other_file(error, path)) is not None and number not in _USED_UP:
            raise NirvanaError(f"{other} cannot be read: {reason}.") from error
        raise _cannot_write(path, reason, number, elsewhere) from error


def require_free_bytes(path: Path, needed_bytes: int, *, what: str) -> None:
    """Raise NirvanaError if the disk of ``path`` has less than ``needed_bytes`` free."""
    free_bytes = free_disk_bytes(path)
    if free_bytes < needed_bytes:
        raise NirvanaError(
            f"{what} needs about {format_bytes(needed_bytes)} on the disk of {path}, "
            f"which has {format_bytes(free_bytes)} free.",
            hint="Free some space, or choose another place with --out DIR.",
        )


def free_disk_bytes(path: Path) -> int:
    """What the disk has free on which ``path`` lies, or would."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_memory(needed_bytes: float, *, what: str, hint: str = _LESS_MEMORY) -> None:
    """Raise NirvanaError if this process cannot take ``needed_bytes`` more, swap included."""
    free_bytes = free_memory_bytes()
    if free_bytes < needed_bytes:
        raise NirvanaError(
            f"{what} needs at least {format_bytes(needed_bytes)} of memory, "
            f"and {format_bytes(free_bytes)} are free.",
            hint=hint,
        )


def free_memory_bytes() -> int:
    """What this process can still take: of the machine with its swap, of its control groups, of its limit."""
    import psutil

    left = [psutil.virtual_memory().available + psutil.swap_memory().free, *_left_to_groups()]
    if (limit := address_space_limit_bytes()) is not None:
        left.append(limit - psutil.Process().memory_info().vms)
    return int(max(0, min(left)))


@contextmanager
def exhaustion_errors(doing: str) -> Iterator[None]:
    """Turn exhausted memory, or a full disk, however a library says it, into a NirvanaError.

    ``doing`` begins the sentence: "The stage 'curves'".
    """
    try:
        yield
    except NirvanaError:
        raise
    except Exception as error:
        number = _number_of(error)
        if isinstance(error, MemoryError) or number == errno.ENOMEM or _says(error, _MEMORY_SIGNS):
            raise NirvanaError(
                f"{doing} ran out of memory: {format_bytes(free_memory_bytes())} are free now.",
                hint=_LESS_MEMORY,
            ) from error
        if number in _USED_UP:
            path = getattr(error, "filename", None) or tempfile.gettempdir()
            raise _cannot_write(Path(path), _DISK_REASONS[number], number, _TEMPORARY) from error
        raise


_TEMPORARY = "let temporary files lie elsewhere: TMPDIR=DIR"


def _cannot_write(path: Path, reason: str, number: int | None, elsewhere: str) -> NirvanaError:
    free = ""
    if number in _USED_UP:
        with suppress(OSError):
            free = f" ({format_bytes(free_disk_bytes(path))} are free)"
    return NirvanaError(f"Cannot write {path}: {reason}{free}.", hint=f"Free some space, or {elsewhere}.")


def _number_of(error: BaseException) -> int | None:
    """The system's number of an error, also where a library tells it in words."""
    if isinstance(error, OSError):
        return error.errno
    for number in (*_USED_UP, errno.ENOMEM):
        if _says(error, (f"(os error {number})", os.strerror(number).lower())):
            return number
    return errno.ENOSPC if _says(error, _TORCH_WRITES_NO_MORE) else None


def _says(error: BaseException, signs: tuple[str, ...]) -> bool:
    said = f"{type(error).__name__}: {error}".lower()
    return any(sign in said for sign in signs)


def _other_file(error: BaseException, path: Path) -> Path | None:
    """The file of an error that lies neither in ``path`` nor beside it: one that was read."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str) or Path(name).resolve().is_relative_to(path.resolve().parent):
        return None
    return Path(name)


def _left_to_groups() -> Iterator[int]:
    """What the limits of this process's control groups (version 2) leave, caches of files counted as free."""
    root = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        place = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("0::/")[2].strip()
        for group in (root / place, *(root / place).parents):
            if not group.is_relative_to(root):
                break
            with suppress(OSError, ValueError):
                limit = int((group / "memory.max").read_text())
                used = int((group / "memory.current").read_text())
                lines = (group / "memory.stat").read_text().splitlines()
                cache = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
                yield limit - used + cache
