"""Engines of an output folder: found, verified and measured, with a GPU that is a fake."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from builders.fake_cuda import FakeDriver
from builders.fake_tensorrt import decoder_profiles, pretend_gpu, write_fake_engine
from builders.scripts import ROOT
from builders.tiny import write_tiny
from click.testing import CliRunner

from nirvana_deploy.base.artifact import sha256_of, write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json, typed
from nirvana_deploy.cli.main import commands
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.run import Run
from nirvana_deploy.runtime.models import engines_of, models_for
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice
from nirvana_deploy.runtime.tensorrt.record import read_engine_record, record_path
from nirvana_deploy.verify import stage as measuring
from nirvana_deploy.verify.folder import FolderCheck
from nirvana_deploy.verify.report import VerifyReport


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense and pruned of an output folder (two models of one vocabulary), and the pruned one's engine."""
    out = tmp_path_factory.mktemp("finished")
    write_tiny(out / "model", "llama-biased")
    write_tiny(out / "checkpoint", "llama-tied")
    onnx_from_checkpoint(Checkpoint.open(out / "model"), out / "dense" / "onnx")
    onnx_from_checkpoint(Checkpoint.open(out / "checkpoint"), out / "onnx")
    (out / "engine").mkdir()
    make_engine(out / "engine" / "smaller.engine", out / "onnx")
    files = {name: f"{name}/model.onnx" for name in ("dense/onnx", "onnx")}
    stages = {
        stage: {"files": {file: sha256_of(out / file)}, "result": {}}
        for stage, file in (("dense-onnx", files["dense/onnx"]), ("onnx", files["onnx"]))
    }
    write_json(
        out / "manifest.json",
        {"schema": 1, "model": {"name": "m", "path": str(out / "model")}, "options": {}, "stages": stages},
    )
    return out


def make_engine(path: Path, folder: Path) -> Path:
    profiles = decoder_profiles(folder, batch_size=2, step_tokens=24, total_tokens=64)
    write_fake_engine(path, folder, profiles=profiles)
    record = {**read_json(record_path(path)), "onnx_sha256": {"model.onnx": sha256_of(folder / "model.onnx")}}
    write_json(record_path(path), record)
    return path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    return pretend_gpu(monkeypatch, tmp_path / "cache")


def test_an_engine_belongs_to_the_onnx_that_it_was_built_from(finished: Path) -> None:
    run = Run.open(finished)
    found = {variant.name: path for variant, path in models_for(run, "tensorrt-rtx").items()}
    assert found == {"pruned": finished / "engine" / "smaller.engine"}
    for runtime in (None, "onnxruntime-cuda"):
        folders = {variant.name: path for variant, path in models_for(run, runtime).items()}
        assert folders == {"dense": finished / "dense" / "onnx", "pruned": finished / "onnx"}


def test_or_to_the_variant_whose_name_it_has(finished: Path, tmp_path: Path) -> None:
    engine = write_fake_engine(
        tmp_path / "dense.engine",
        finished / "onnx",
        profiles=decoder_profiles(finished / "onnx", batch_size=1, step_tokens=4, total_tokens=8),
    )
    run = Run(tmp_path, read_json(finished / "manifest.json"))
    assert {v.name: path for v, path in models_for(run, "tensorrt-rtx").items()} == {"dense": engine}


def test_the_plainest_name_stands_for_a_variant(finished: Path, tmp_path: Path) -> None:
    profiles = decoder_profiles(finished / "onnx", batch_size=1, step_tokens=4, total_tokens=8)
    for name in ("pruned", "pruned-in-place", "pruned-bf16-in-place", "pruned-w4", "dense-in-place"):
        write_fake_engine(tmp_path / f"{name}.engine", finished / "onnx", profiles=profiles)
    run = Run(tmp_path, read_json(finished / "manifest.json"))
    found = {variant.name: path.stem for variant, path in models_for(run, "tensorrt-rtx").items()}
    assert found == {"dense": "dense-in-place", "pruned": "pruned"}
    origins = {path.stem: variant.name for path, variant in engines_of(run, "tensorrt-rtx").items()}
    assert origins == {
        "pruned": "pruned",
        "pruned-in-place": "pruned",
        "pruned-bf16-in-place": "pruned",
        "dense-in-place": "dense",
    }


def test_no_engine_of_a_runtime_is_a_sentence(finished: Path) -> None:
    with pytest.raises(NirvanaError, match=r"has no engine of tensorrt\.\n.*build-engine"):
        models_for(Run.open(finished), "tensorrt")


def test_an_engine_is_compared_with_onnxruntime(finished: Path, gpu: FakeDriver) -> None:
    reports = measuring.compare_in(Run.open(finished), "tensorrt-rtx", threads=1)
    report = reports["engine/smaller.engine"]
    assert report.passed
    assert report.greedy[0].equal_prompts == 5
    assert gpu.leaks == {}
    FolderCheck(out=finished, damaged=[], reports={}, compared=reports).require_passed()


def test_an_engine_that_differs_is_named(finished: Path, gpu: FakeDriver) -> None:
    engine = make_engine(finished / "engine" / "smaller.engine", finished / "dense" / "onnx")
    record = read_json(record_path(engine))
    changed = {"model.onnx": sha256_of(finished / "onnx" / "model.onnx")}
    write_json(record_path(engine), {**record, "onnx_sha256": changed})
    try:
        reports = measuring.compare_in(Run.open(finished), "tensorrt-rtx", threads=1)
    finally:
        make_engine(engine, finished / "onnx")
    with pytest.raises(
        NirvanaError, match=r"does not compute what ONNX Runtime on the CPU .*tensorrt-rtx"
    ) as e:
        FolderCheck(out=finished, damaged=[], reports={}, compared=reports).require_passed()
    assert e.value.exit_code == 3


# benchmarks/gpu.py


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, gpu: FakeDriver) -> ModuleType:
    """The script, with builds that are fakes, and times that no subprocess measures."""
    path = ROOT / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmarks_gpu", module)  # its dataclass looks there
    spec.loader.exec_module(module)

    def build(folder: Path, out: Path, *, name: str, **_: Any) -> Any:
        out.mkdir(exist_ok=True)
        path = make_engine(out / f"{name}.engine", folder)
        return type("Built", (), {"path": path, "record": read_engine_record(path)})

    monkeypatch.setattr(module, "engine_from_onnx", build)
    monkeypatch.setattr(module, "run_tests", lambda: {"passed": True, "output": ""})
    monkeypatch.setattr(module, "timed", lambda models, runtime, workload: {"models": len(models)})
    return module


def test_the_script_records_what_it_ran(script: ModuleType, finished: Path, tmp_path: Path) -> None:
    arguments = [str(finished), "--work", str(tmp_path / "work"), "--json", str(tmp_path / "gpu.json")]
    assert script.main([*arguments, "--runtime", "tensorrt-rtx"]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["environment"]["compute_capability"] == "sm89"
    assert set(record["runs"]) == {"tensorrt-rtx concat", "tensorrt-rtx in-place"}
    for found in record["runs"].values():
        reports = typed(found["verified"], dict[str, VerifyReport], "verified")
        assert {name: report.passed for name, report in reports.items()} == {"dense": True, "pruned": True}
        assert found["planned_bytes"]["pruned"]["cache_copies"] in (1, 2)
    failed = {"tests": {"passed": True}, "runs": {"x": {"verified": {"dense": {"passed": False}}}}}
    assert script.all_passed(record)
    assert not script.all_passed(failed)


def test_the_script_without_a_gpu_says_so(
    script: ModuleType, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "CudaDevice", lambda: CudaDevice(driver=FakeDriver(devices=0)))
    assert script.main([str(finished)]) == 1
    assert "sees no GPU" in capsys.readouterr().err


def test_a_runner_is_opened_by_the_command_line_too(finished: Path, gpu: FakeDriver) -> None:
    arguments = ["generate", str(finished / "engine" / "smaller.engine"), "--prompt", "Hello", "--json"]
    result = CliRunner().invoke(commands, [*arguments, "--max-new-tokens", "6"], catch_exceptions=False)
    on_cpu = ["generate", str(finished), "--prompt", "Hello", "--max-new-tokens", "6", "--json"]
    expected = CliRunner().invoke(commands, on_cpu, catch_exceptions=False)
    found, wanted = json.loads(result.stdout), json.loads(expected.stdout)
    assert (found["runtime"], wanted["runtime"]) == ("tensorrt-rtx", "onnxruntime-cpu")
    assert found["text"] == wanted["text"]


def test_the_map_streams_from_an_engine(
    finished: Path, gpu: FakeDriver, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "nirvana_deploy" / "README.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n([^`]*generate_text\(.*?)```", page, flags=re.DOTALL)
    engine = finished / "engine" / "smaller.engine"
    source = re.sub("^benchmark_folder.*$", "", source, flags=re.MULTILINE)
    source = source.replace("smollm2-s0.4", str(engine)).replace("max_new_tokens=64", "max_new_tokens=5")
    exec(compile(source, "README.md", "exec"), {})  # the page's own lines
    streamed = capsys.readouterr().out.replace("\n", "")
    expected = run_command("generate", finished / "onnx", "--prompt", "The capital of France is")
    assert streamed and streamed == expected
    assert gpu.used_bytes == 0


def run_command(*arguments: str | Path) -> str:
    """Its stdout, without line ends."""
    words = [*map(str, arguments), "--max-new-tokens", "5", "--threads", "1"]
    result = CliRunner().invoke(commands, words, catch_exceptions=False)
    return str(result.stdout).replace("\n", "")
