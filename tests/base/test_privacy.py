"""Libraries keep no device id and send nothing: their switches are set before each is imported."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders.desk import environment_at_a_desk
from builders.scripts import ROOT

from nirvana_deploy.base.privacy import PACKAGES, SWITCHES, switch_telemetry_off


def left_behind(code: str, folder: Path, **setting: str) -> list[str]:
    """Files in the home and temporary folders of a process that runs ``code``, without our switches."""
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    places = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(ROOT)}
    environment = environment_at_a_desk() | places | setting
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return [path.name for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime_genai", "openvino"])
def test_a_runtime_leaves_no_device_id(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    assert left_behind(f"import nirvana_deploy, {runtime}", tmp_path) == []


def test_what_the_user_sets_wins(tmp_path: Path) -> None:
    """Shows too that the test above can fail."""
    found = left_behind("import nirvana_deploy, onnxruntime", tmp_path, ORT_DISABLE_TELEMETRY="0")
    assert "deviceid" in found


def test_switches_are_set_for_children_unless_the_user_has(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = SWITCHES
    monkeypatch.delenv(ours)
    monkeypatch.setenv(theirs, "0")
    switch_telemetry_off()
    assert (os.environ[ours], os.environ[theirs]) == ("1", "0")


@pytest.mark.parametrize(
    "file", [path for path in ROOT.glob("benchmarks/*.py") if "\nimport onnxruntime" in path.read_text()]
)
def test_a_script_imports_this_package_before_a_runtime(file: Path) -> None:
    imported = [
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    first = next(name for name in imported if name.startswith(("nirvana_deploy", "onnxruntime")))
    assert first.startswith("nirvana_deploy")


def test_a_script_without_this_package_switches_telemetry_off_itself() -> None:
    source = (ROOT / "benchmarks/peer_worker.py").read_text(encoding="utf-8")
    assert '"ORT_DISABLE_TELEMETRY"' in source[: source.index("import numpy")]
    assert all(f'"{name}"' in source[: source.index("import openvino")] for name in PACKAGES)
