"""What may be replaced: only what this tool wrote.

A folder that was written whole has a marker, which lists the names in it; it is replaced when it holds
nothing else. A place that is, contains or lies inside what is read, and one that holds the user's home or
working folder, is refused whatever lies there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TypedDict

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.temporary import is_abandoned
from nirvana_deploy.base.reading import read_json

MARKER = ".made-by-nirvana-deploy"
"""JSON that is the same for the same names. No suffix: programs that look for *.json do not meet it."""
TOOL = "nirvana-deploy"
CARD = "README.md"
"""The model card of a folder: a page for people, who may make it their own; no manifest promises it."""
CARD_NOTE = "<!-- nirvana-deploy writes this page anew; remove this line to keep what you change. -->"
"""Without this line in it, a card is its reader's."""
_CARD_CHARACTERS = 1 << 20
_SCHEMA = 1
_NAMED, _COUNTED = 3, 1000
_ELSEWHERE = "Choose another place with --out."


class _Marker(TypedDict):
    tool: str
    schema: int
    files: list[str]


def marker_text(names: Iterable[str]) -> str:
    """Content of the marker of a folder that holds ``names``, relative to it."""
    return json.dumps({"tool": TOOL, "schema": _SCHEMA, "files": sorted(names)}, indent=1) + "\n"


def marked_names(folder: Path) -> frozenset[str]:
    """The names in ``folder`` that this tool wrote, its marker among them; none without a marker of ours.

    A card that somebody made their own is not among them.
    """
    try:
        marker = read_json(folder / MARKER, _Marker, schema=_SCHEMA)
    except NirvanaError:
        return frozenset()
    if marker["tool"] != TOOL:
        return frozenset()
    names = frozenset([MARKER, *marker["files"]])
    return names - {CARD} if CARD in names and _is_taken_over(folder / CARD) else names


def _is_taken_over(card: Path) -> bool:
    """Whether a card is there that lost its note."""
    if not card.is_file():
        return False
    with card.open(encoding="utf-8", errors="replace") as file:
        return CARD_NOTE not in file.read(_CARD_CHARACTERS)


def files_below(folder: Path) -> Iterator[str]:
    """Everything below ``folder`` that would be lost with it, relative to it: files, links, empty folders.

    Abandoned temporaries are nothing to lose. A folder that cannot be listed counts as one file.
    """
    unreadable: list[str] = []
    for place, folders, files in os.walk(folder, onerror=lambda error: unreadable.append(error.filename)):
        where = Path(place)
        folders[:] = sorted(name for name in folders if not is_abandoned(name))
        links = [name for name in folders if (where / name).is_symlink()]
        for name in sorted([*files, *links]):
            if not is_abandoned(name):
                yield (where / name).relative_to(folder).as_posix()
        if not folders and not files and where != folder:
            yield f"{where.relative_to(folder).as_posix()}/"
    yield from (f"{Path(path).relative_to(folder).as_posix()}/" for path in unreadable)


def strangers(folder: Path) -> Iterator[str]:
    """What lies in ``folder`` that its marker does not list."""
    owned = marked_names(folder)
    return (name for name in files_below(folder) if name not in owned)


def require_ours(target: Path) -> None:
    """Raise NirvanaError if ``target`` is there and is no folder of this tool's files alone."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise NirvanaError(
            f"{target} is not replaced, with --force or without: it is a file.", hint=_ELSEWHERE
        )
    if found := list(islice(strangers(target), _COUNTED)):
        raise foreign(target, found)


def foreign(target: Path, names: Collection[str]) -> NirvanaError:
    """The refusal of ``target``, where ``names`` are not this tool's."""
    named, more = list(names)[:_NAMED], len(names) - _NAMED
    many = "many" if len(names) == _COUNTED else f"{more}"
    said = ", ".join(named) + (f" and {many} more" if more > 0 else "")
    return NirvanaError(
        f"{target} is not replaced, with --force or without: nirvana-deploy did not write {said}.",
        hint="Choose another place with --out, or move what is yours away.",
    )


def require_apart(target: Path, *, reads: Iterable[Path] = (), replaced: bool = True) -> None:
    """Raise NirvanaError if ``target`` is no place to write to, whatever it holds; links are followed.

    It may not be or contain the root, the home folder or the working folder, and not be, contain or lie
    inside one of ``reads``. A mount point cannot be ``replaced``, though written into.
    """
    place = real(target)
    for protected, called in _protected():
        if _within(protected, place):
            what = "is" if _same(place, protected) else "contains"
            raise NirvanaError(f"{target} cannot be written: it {what} {called}.", hint=_ELSEWHERE)
    if replaced and os.path.ismount(place):
        raise NirvanaError(
            f"{target} cannot be written: it is a mount point.", hint=f"Choose a place in it: {target}/NAME"
        )
    for path in reads:
        source = real(path)
        if _same(place, source):
            raise NirvanaError(f"{target} cannot be written: it is what the command reads.", hint=_ELSEWHERE)
        if _within(source, place) or _within(place, source):
            what = "contains" if _within(source, place) else "lies inside"
            raise NirvanaError(
                f"{target} cannot be written: it {what} {path}, which the command reads.", hint=_ELSEWHERE
            )


def require_free(
    target: Path,
    *,
    force: bool,
    reads: Iterable[Path] = (),
    wrote: Callable[[Path], bool] | None = None,
) -> None:
    """Raise NirvanaError unless ``target`` may be written: it is new, or ours and ``force``.

    ``target`` is a folder, or a file of which ``wrote`` says whether this tool wrote it.
    """
    require_apart(target, reads=reads)
    if not os.path.lexists(target):
        return
    place = real(target)
    if wrote is None:
        require_ours(place)
    elif os.path.lexists(place) and not (place.is_file() and wrote(place)):
        raise foreign(target, ["it"])
    if not force:
        raise NirvanaError(
            f"{target} exists already.", hint="Pass --force to replace it, or another place with --out."
        )


def real(path: Path) -> Path:
    """``path`` without links; raises NirvanaError when they lead in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise NirvanaError(f"{path} cannot be followed: {error}.", hint=_ELSEWHERE) from None


def _protected() -> Iterator[tuple[Path, str]]:
    yield Path("/"), "the root of the file system"
    with suppress(RuntimeError):
        yield Path.home().resolve(), "your home folder"
    with suppress(OSError):
        yield Path.cwd(), "the working folder"


def _within(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or lies in it, by whatever name."""
    return any(_same(one, folder) for one in (path, *path.parents))


def _same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    with suppress(OSError):
        return one.samefile(other)
    return False
