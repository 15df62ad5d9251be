"""What the names of weights say: which role a linear plays in which layer, by the families' table."""

from __future__ import annotations

import re
from functools import cache

from nirvana_deploy.model.families import LAYOUTS

HEAD = "head"
_PROBE_LAYER = 987654321  # a layer number that occurs in no name


def described(name: str, transposed: bool) -> tuple[str, str, str, int | None]:
    """(name, role, site, layer) of the linear whose weight is ``<name>.weight``."""
    for family in LAYOUTS:
        if name == family.head or (transposed and name == family.embedding):
            return family.head, HEAD, "", None
    for pattern, role, site in _patterns():
        if match := pattern.fullmatch(name):
            return name, role, site, int(match[1])
    return name, "other", "", None


def is_embedding(name: str) -> bool:
    """Whether ``<name>.weight`` is the table of a family's tokens."""
    return any(name == family.embedding for family in LAYOUTS)


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str, str], ...]:
    """(module name with its layer number as group 1, role, site), for every linear of every family."""
    found: dict[str, tuple[re.Pattern[str], str, str]] = {}
    for family in LAYOUTS:
        for site in family.sites:
            roles = {site.q: "q", site.k: "k", site.v: "v", site.o: "o"}
            if site.ffn_rows:
                roles |= dict(zip(reversed(site.ffn_rows), ("up", "gate"), strict=False))
                roles[site.ffn_down] = "down"
            for module, role in roles.items():
                text = re.escape(f"{site.layer(_PROBE_LAYER)}.{module}").replace(str(_PROBE_LAYER), r"(\d+)")
                found[text] = (re.compile(text), role, site.name)
    return tuple(found.values())
