"""What Unix alone has; a test that needs it is skipped elsewhere, and says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


def named_pipe(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs a system with named pipes")
    os.mkfifo(path)


def resource_limits() -> Any:
    """The module ``resource``."""
    return pytest.importorskip("resource", reason="needs a system with limits on processes")


def forked() -> int:
    if not hasattr(os, "fork"):
        pytest.skip("needs a system that forks")
    return os.fork()


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0
