"""A pytest plugin that hides packages, as if they weren't installed: ``-p builders.without``.

The environment variable WITHOUT names what is hidden, with commas: modules by their top-level name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

HIDDEN = set(os.environ["WITHOUT"].split(","))


class _Without(PathFinder):
    """The path finder, which doesn't find what is hidden: neither by import nor by ``find_spec``."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = _Without
