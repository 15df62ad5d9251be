"""Parts of a search that were made apart, and whether those in one folder belong together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.output.layout import PARTS

SCHEMA = 1
_COPY = "Copy the parts of one search into an empty folder, each of them once."


@dataclass(frozen=True)
class Part:
    """What one job of several makes of a search."""

    schema: int
    shard: str
    """ "2/8"."""
    key: str
    """Of all that the search has in common, as in each of its points."""
    model: str
    files: dict[str, str]
    """Of the model: name -> sha256."""
    options: dict[str, Any]
    cuts: tuple[str, ...]
    """Names of the folders that it makes."""
    points: tuple[str, ...]
    """Their results, relative to the search's folder."""


def place_of(shard: str, run: str) -> str:
    """Where a part says what it is, relative to the search's folder; parts of other runs lie beside it."""
    return f"{PARTS}/{shard.replace('/', '-of-')}-{run}.json"


def parts_in(out: Path, *, mixed: bool = False) -> dict[str, Part]:
    """The parts in a search's folder, by the names of their files.

    Raises NirvanaError where two are of different searches, or of different folders and made the same cut,
    unless they may be ``mixed``.
    """
    found = {
        f"{PARTS}/{path.name}": read_json(path, Part, schema=SCHEMA)
        for path in sorted((out / PARTS).glob("*.json"))
    }
    for (one, first), (other, second) in () if mixed else combinations(found.items(), 2):
        if first.key != second.key:
            raise NirvanaError(
                f"{out} holds parts of two searches, {one} of {first.model} and {other} of {second.model}: "
                f"they differ in {_difference(first, second)}.",
                hint=_COPY,
            )
        # shards of one folder share its run's name, and cuts where one was resumed with more
        apart = one.rpartition("-")[2] != other.rpartition("-")[2]
        if apart and (same := set(first.cuts) & set(second.cuts)):
            raise NirvanaError(
                f"{out} holds parts that overlap: {one} and {other} both made {min(same)}.", hint=_COPY
            )
    return found


def _difference(first: Part, second: Part) -> str:
    if first.files != second.files:
        return "their weights"
    names = sorted({*first.options, *second.options})
    values = [(name, first.options.get(name), second.options.get(name)) for name in names]
    return next(
        (f"{name}, {one!r} and {other!r}" for name, one, other in values if one != other), "their keys"
    )
