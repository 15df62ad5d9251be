from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders.fake_runtime import ROW
from builders.fake_tensorrt import decoder_profiles, write_fake_engine

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.worker import serve
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.run import Run
from nirvana_deploy.runtime.doctor import examine_machine
from nirvana_deploy.runtime.models import models_for
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.table import RUNTIMES, engine_runtimes, runtime_of_provider
from nirvana_deploy.verify.stage import compare_in


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder whose pruned model is a tiny one, with an engine beside it."""
    out = tmp_path_factory.mktemp("finished")
    onnx_from_checkpoint(Checkpoint.open(tiny_llama), out / "onnx")
    (out / "checkpoint").symlink_to(tiny_llama)
    manifest = {
        "schema": 1,
        "options": {},
        "model": {"name": "m"},
        "stages": {"onnx": {"files": {}, "result": {}}},
    }
    (out / "manifest.json").write_text(json.dumps(manifest))
    profiles = decoder_profiles(out / "onnx", batch_size=1, step_tokens=4, total_tokens=8)
    write_fake_engine(out / "pruned.engine", out / "onnx", profiles=profiles)
    return out


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(RUNTIMES, ROW.name, ROW)
    return ROW.name


def test_the_table_imports_nothing_heavy() -> None:
    code = (
        "import sys; from nirvana_deploy.runtime.table import RUNTIMES; "
        "print(*{'numpy', 'onnx', 'torch', 'onnxruntime', 'psutil'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_one_row_adds_a_runtime(finished: Path, fake: str) -> None:
    """It is opened, listed, verified against ONNX Runtime and measured."""
    with open_runner(finished / "onnx", runtime=fake, threads=1) as runner:
        assert (runner.runtime, runner.threads) == ("fake", 1)
    finding = next(finding for finding in examine_machine() if finding.name == "--runtime fake")
    assert (finding.usable, finding.detail) == (True, "ONNX folders, on the CPU")
    run = Run(finished, read_json(finished / "manifest.json"))
    assert {variant.name: path for variant, path in models_for(run, fake).items()} == {
        "pruned": finished / "onnx"
    }
    report = compare_in(run, fake, threads=1)["onnx"]
    assert report.passed and len(report.checks) == 3
    assert (report.greedy[0].runtime, report.greedy[0].equal_prompts) == ("fake", 5)
    answers = io.StringIO()
    request = io.StringIO(json.dumps({"tokens": [[5, 6, 7]], "new_tokens": 4}) + "\n")
    serve(finished / "onnx", threads=1, runtime=fake, requests=request, answers=answers)
    loaded, sample = map(json.loads, answers.getvalue().splitlines())
    assert loaded["runtime"] == "fake" and len(sample["itl_ms"]) == 3


def test_a_new_runtime_takes_what_its_row_says(finished: Path, fake: str) -> None:
    with pytest.raises(NirvanaError, match="The runtime fake runs an ONNX folder"):
        open_runner(finished / "pruned.engine", runtime=fake)
    assert fake not in engine_runtimes()


def test_a_runtime_of_gguf_files_says_how_they_are_timed(finished: Path) -> None:
    run = Run(finished, read_json(finished / "manifest.json"))
    with pytest.raises(NirvanaError, match=r"llama-cpp runs GGUF files, .*\n.*package .* --gguf, then"):
        models_for(run, "llama-cpp")


def test_a_provider_is_one_runtime() -> None:
    providers = [row.provider for row in RUNTIMES.values() if row.provider]
    assert len(set(providers)) == len(providers)
    assert [runtime_of_provider(one) for one in providers] == list(RUNTIMES)[: len(providers)]
    assert runtime_of_provider("SomeExecutionProvider") == "SomeExecutionProvider"
