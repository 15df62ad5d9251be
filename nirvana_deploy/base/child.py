"""Child processes that run this package."""

from __future__ import annotations

import os
from pathlib import Path

import nirvana_deploy


def child_environment() -> dict[str, str]:
    """This process's environment with this package first on PYTHONPATH, to run the same code anywhere."""
    ours = str(Path(nirvana_deploy.__file__).resolve().parent.parent)
    paths = os.pathsep.join(path for path in (ours, os.environ.get("PYTHONPATH")) if path)
    return {**os.environ, "PYTHONPATH": paths}
