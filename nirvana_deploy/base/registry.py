"""Name lookup in a small table, with "did you mean" for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from nirvana_deploy.base.errors import NirvanaError

Entry = TypeVar("Entry")


def nearest_names(name: str, names: list[str], *, at_most: int = 3) -> list[str]:
    """Return the names closest to ``name``, best first; none if nothing is close."""
    return difflib.get_close_matches(name.lower(), names, n=at_most, cutoff=0.5)


def look_up(name: str, table: Mapping[str, Entry], *, what: str, hint: str | None = None) -> Entry:
    """Return ``table[name]``; raise NirvanaError with the closest and all known names."""
    if name in table:
        return table[name]
    close = nearest_names(name, list(table))
    guess = f" Did you mean {' or '.join(repr(n) for n in close)}?" if close else ""
    raise NirvanaError(f"Unknown {what} {name!r}.{guess} Known: {', '.join(sorted(table))}.", hint=hint)
