"""A missing extra skips the files and tests that need it, says why, and stops no other."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from builders.extras import EXTRAS
from builders.scripts import ROOT


@pytest.mark.integration
def test_without_every_extra_the_suite_is_collected_and_the_reasons_are_printed() -> None:
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "builders.without"]
    found = subprocess.run(  # without the plugin of a package that is hidden
        [*command, "-p", "no:cacheprovider", "-p", "no:hypothesispytest"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "WITHOUT": ",".join(EXTRAS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr
    assert "tests/model/test_sources.py::" in found.stdout
    reasons = re.findall(r"^SKIPPED \[\d+\] (\S+?):\d+: needs (\S+): pip install", found.stdout, re.MULTILINE)
    assert {package for _, package in reasons} == {
        "fastapi",
        "gguf",
        "onnxruntime-genai",
        "openvino",
        "openvino-genai",
        "tensorrt-rtx",
        "tritonclient",
        "uvicorn",
    }
    assert ("tests/package/test_gguf.py", "gguf") in reasons
