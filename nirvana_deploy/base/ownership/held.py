"""A folder or file that a command writes whole: it is free, and nobody else writes it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nirvana_deploy.base.ownership.lock import FolderLock
from nirvana_deploy.base.ownership.marker import real, require_free
from nirvana_deploy.base.resources import disk_errors


@contextmanager
def held(
    target: Path,
    *,
    force: bool,
    reads: Iterable[Path] = (),
    wrote: Callable[[Path], bool] | None = None,
) -> Iterator[None]:
    """Keep others out of ``target`` for as long as the block runs.

    Raises NirvanaError as :func:`require_free` does, and when another process writes there. Folders that are
    made around it go again if nothing comes into them.
    """
    reads = tuple(reads)
    require_free(target, force=force, reads=reads, wrote=wrote)
    place = real(target)
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        with disk_errors(target):
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(place, beside=True)
        with lock:
            require_free(target, force=force, reads=reads, wrote=wrote)  # nobody has come in between
            yield
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
