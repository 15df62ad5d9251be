"""Which names in an output folder are this tool's: its manifest says so, and a folder's own marker.

The manifest names a file or folder before it is written, so that a killed run leaves nothing unknown.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nirvana_deploy.base.ownership import marker, temporary
from nirvana_deploy.base.ownership.lock import LOCK
from nirvana_deploy.output.layout import MANIFEST, NAMES_OF_A_RUN
from nirvana_deploy.output.manifest import our_manifest


def names(out: Path) -> list[str]:
    """Files and folders that runs wrote, or were about to; none when the manifest is missing or not ours."""
    manifest = our_manifest(out) or {}
    return list(manifest.get("makes", ()))


def occupied(out: Path) -> bool:
    """Whether a folder holds anything that matters."""
    return any(
        not path.name.endswith(LOCK) and not temporary.is_abandoned(path.name) for path in out.iterdir()
    )


def in_the_way(out: Path) -> list[str]:
    """What stands where a run would write, and is not this tool's."""
    manifest = our_manifest(out)
    found = sorted(names_of_a_run(out))
    if manifest is not None:
        found.remove(MANIFEST)
    return list(strangers(out, found, manifest or {}))


def names_of_a_run(out: Path) -> set[str]:
    """Names in a folder that a run may write, whoever wrote them."""
    return {
        path.name
        for path in out.iterdir()
        if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in NAMES_OF_A_RUN)
    }


def strangers(out: Path, wanted: Iterable[str], manifest: Mapping[str, Any]) -> Iterator[str]:
    """What stands under the names ``wanted`` and is not this tool's, relative to ``out``."""
    ours = manifest.get("makes", ())
    for name in wanted:
        path = out / name
        inside = [one for one in ours if one.startswith(f"{name}/")]
        if not os.path.lexists(path):
            continue
        if name not in ours and not inside:
            yield name
        elif path.is_dir():
            for folder in inside or [name]:
                if (out / folder).is_dir():
                    yield from (f"{folder}/{stranger}" for stranger in marker.strangers(out / folder))


def remove(out: Path, name: str) -> None:
    """Remove what is ours under ``name``, and the folder around it if that is empty then."""
    path = out / name
    if not path.parent.resolve().is_relative_to(out.resolve()):  # it is reached by a link
        return
    temporary.remove(path)
    if path.parent != out:
        with suppress(OSError):
            path.parent.rmdir()


def discard(out: Path) -> None:
    """Remove a run's folder as far as it is this tool's; what else lies there stays, with the folder."""
    manifest = our_manifest(out)
    if manifest is None:
        return
    for name in manifest["makes"]:
        if not list(strangers(out, [name], manifest)):
            remove(out, name)
    for name in (MANIFEST, LOCK):
        temporary.remove(out / name)
    remove_empty(out)


def remove_empty(folder: Path) -> None:
    """Remove a folder that holds nothing."""
    with suppress(OSError):
        folder.rmdir()
