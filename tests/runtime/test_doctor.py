from __future__ import annotations

import importlib.metadata
import json
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
from builders.fake_cuda import FakeDriver
from builders.scripts import ROOT
from click.testing import CliRunner

from nirvana_deploy.base.errors import install_extra
from nirvana_deploy.runtime import doctor
from nirvana_deploy.runtime.doctor import EXTRAS, Finding, examine_machine
from nirvana_deploy.runtime.table import RUNTIMES
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice

FAKE_TENSORRT: Any = SimpleNamespace(__version__="11.0")


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NIRVANA_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_reports_what_is_really_here(cache: Path) -> None:
    found = by_name(examine_machine())
    assert found["onnxruntime"].usable
    assert found["onnxruntime"].detail.startswith(onnxruntime.__version__)
    assert "CPUExecutionProvider" in found["onnxruntime"].detail
    assert found["python"].detail.startswith(sys.version.split()[0])
    assert str(cache) in found["cache"].detail and not cache.exists()
    assert {"torch", "onnxruntime-genai", "tensorrt", "tensorrt-rtx", "cpu", "memory", "disk"} <= found.keys()


def test_everything_that_is_missing_has_a_command(cache: Path) -> None:
    assert all(finding.fix for finding in examine_machine() if not finding.usable)
    assert not any(finding.fix for finding in examine_machine() if finding.usable)


def test_missing_runtime(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    finding = by_name(examine_machine())["onnxruntime"]
    assert finding == Finding("runtimes", "onnxruntime", False, "not installed", install_extra("cpu"))


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (OSError("libnvinfer.so.11: cannot open shared object file"), "does not load: libnvinfer.so.11"),
        (ImportError("DLL load failed\nmore"), "does not load: DLL load failed"),
        (ModuleNotFoundError("No module named 'cuda'", name="cuda"), "installed, but cuda is missing"),
    ],
)
def test_runtime_whose_native_library_does_not_load(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, detail: str
) -> None:
    real = doctor.importlib.import_module

    def broken(name: str) -> Any:
        if name == "tensorrt":
            raise error
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    finding = by_name(examine_machine())["tensorrt"]
    assert not finding.usable and detail in finding.detail and finding.fix == install_extra("gpu")


def test_every_runner_says_what_it_lacks(cache: Path) -> None:
    found = by_name(examine_machine())
    assert found["--runtime onnxruntime-cpu"].usable
    for name in RUNTIMES:
        finding = found[f"--runtime {name}"]
        assert finding.usable or finding.fix
    if not found["gpu"].usable:
        usable = {name for name in RUNTIMES if found[f"--runtime {name}"].usable}
        on_request = {"llama-cpp", "openvino-cpu"}  # of extras; pip compiles the first where it is asked for
        assert usable - on_request == {"onnxruntime-cpu", "torch"}


def test_a_gpu_makes_engines_usable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", FAKE_TENSORRT)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FAKE_TENSORRT)
    monkeypatch.setattr(doctor, "CudaDevice", lambda: CudaDevice(driver=FakeDriver()))
    found = by_name(examine_machine())
    assert found["gpu"] == Finding("machine", "gpu", True, "Fake L4, sm89, 1.07 GB free of 1.07 GB")
    assert found["--runtime tensorrt"].detail.startswith("engine files, on Fake L4")
    assert not found["--runtime onnxruntime-nvtensorrtrtx"].usable


def test_without_a_gpu_its_absence_is_the_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", FAKE_TENSORRT)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FAKE_TENSORRT)
    monkeypatch.setattr(doctor, "CudaDevice", lambda: CudaDevice(driver=FakeDriver(devices=0)))
    finding = by_name(examine_machine())["--runtime tensorrt-rtx"]
    assert finding.detail == ("installed, for engine files; The NVIDIA driver of this machine sees no GPU.")


def test_missing_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", nothing)
    finding = by_name(examine_machine())["datasets [data]"]
    assert (finding.usable, finding.fix) == (False, install_extra("data"))


def test_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    finding = by_name(examine_machine())["cache"]
    assert (finding.usable, finding.fix) == (False, "export NIRVANA_DEPLOY_CACHE=DIR")


def test_used_bytes_of_the_cache_are_counted(cache: Path) -> None:
    cache.mkdir()
    (cache / "weights").write_bytes(bytes(20_000_000))
    assert "20.0 MB used" in by_name(examine_machine())["cache"].detail


def test_extras_are_those_of_pyproject() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = pyproject["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert {requirement.split(">")[0].split("[")[0] for requirement in declared[extra]} == set(packages)
    for finding in examine_machine():
        if finding.fix and "[" in finding.fix:
            assert finding.fix.split("[")[1].split("]")[0] in declared


def test_command_prints_the_findings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nirvana_deploy.cli.doctor import doctor as command

    monkeypatch.setenv("COLUMNS", "400")  # no line is broken
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = CliRunner().invoke(command, ["--json"])
    findings = json.loads(result.stdout)["findings"]
    assert {finding["name"] for finding in findings} == by_name(examine_machine()).keys()
    table = CliRunner().invoke(command).stdout
    assert "onnxruntime" in table and install_extra("cpu") in table
