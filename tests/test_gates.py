"""The tools that every change passes; ``make lint`` runs this file alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from builders.scripts import ROOT

pytestmark = pytest.mark.gate


@pytest.mark.parametrize(
    "command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join
)
def test_tool(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
