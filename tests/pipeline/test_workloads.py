"""``benchmark --workload`` and ``--sweep`` on an output folder: what is kept, shown and refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.extras import needs
from builders.jobs import TINY_JOB
from builders.tiny import write_tiny
from click.testing import CliRunner

import nirvana_deploy as library
from nirvana_deploy.base.errors import ContenderError, NirvanaError, install_extra
from nirvana_deploy.cli.benchmark import benchmark
from nirvana_deploy.measure.recipe import Traffic, Workload
from nirvana_deploy.measure.worker import WorkerProcess

pytestmark = pytest.mark.integration
SHORT = Workload(prompt_tokens=6, new_tokens=3, repeats=2, threads=1)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workloads")
    model = write_tiny(folder / "model", "llama-tied")
    return library.prune_export(str(model), out=folder / "out", **TINY_JOB).out


def asked(*words: Any) -> Any:
    return CliRunner().invoke(benchmark, [str(word) for word in words])


def test_results_are_kept_by_name_and_the_benchmark_stays(out: Path, tmp_path: Path) -> None:
    before = (out / "benchmark.json").read_bytes()
    mine = tmp_path / "mine.toml"
    mine.write_text("about = 'Mine.'\nprompt_tokens = [4, 8]\nnew_tokens = 3\nrequests = 8\n")
    found = library.benchmark_workloads(out, Traffic(workloads=(str(mine),)), SHORT)
    assert repr(found) == "Record(mine)" and "Time to first token" in found._repr_html_()
    words = ("--sweep", "batch=1,2", "--new-tokens", 3, "--repeats", 2, "--threads", 1)
    shown = asked(out, *words)
    assert shown.exit_code == 0, shown.output
    assert "# Against sequences in a batch" in shown.stdout and "# Workload mine" not in shown.stdout
    record = json.loads((out / "workloads.json").read_text())
    assert [one["name"] for one in record["workloads"]] == ["mine"]
    assert [one["path"] for one in record["workloads"][0]["variants"]] == ["dense/onnx", "onnx"]
    assert [one["axis"] for one in record["sweeps"]] == ["batch"]
    page = (out / "report.html").read_text()
    assert "<h2>Workload mine</h2>" in page and "<h2>Against sequences in a batch</h2>" in page
    assert (out / "benchmark.json").read_bytes() == before
    assert library.verify_folder(out).passed


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    """A workload of two clients."""
    file = tmp_path / "clients.toml"
    file.write_text("prompt_tokens = [4, 8]\nnew_tokens = 3\nconcurrency = 2\nrequests = 12\n")
    return file


def test_a_workload_with_clients_is_asked_through_servers(out: Path, clients: Path) -> None:
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        needs(module)
    shown = asked(out, "--workload", clients, "--threads", 1)
    assert shown.exit_code == 0, shown.output
    assert "12 requests, 2 open at a time at a server of each model, in 6 rounds in turn" in shown.stdout
    record = json.loads((out / "workloads.json").read_text())
    (found,) = (one for one in record["workloads"] if one["name"] == "clients")
    assert [(one["path"], one["slots"]) for one in found["variants"]] == [("dense/onnx", 2), ("onnx", 2)]
    assert found["comparisons"][0]["rate_speedup"]["confidence"] > 0.95
    assert "Speed-up, requests per second" in (out / "report.html").read_text()
    assert library.verify_folder(out).passed


def test_servers_need_their_extra_and_models_that_they_take(
    out: Path, clients: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (out / "workloads.json").read_bytes() if (out / "workloads.json").exists() else None
    refused = asked(out, "--workload", clients, "--runtime", "torch").exception
    assert "clients has concurrency = 2, so each model is asked through a server, and dense" in str(refused)
    assert "is a checkpoint folder, and what is served is an ONNX folder" in str(refused)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    missing = asked(out, "--workload", clients).exception
    assert isinstance(missing, library.NirvanaError) and missing.hint == install_extra("serve")
    after = (out / "workloads.json").read_bytes() if (out / "workloads.json").exists() else None
    assert before == after


def test_files_that_were_changed_are_not_timed(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    with (copy / "onnx" / "model.onnx").open("ab") as file:
        file.write(b"x")
    for words in ((), ("--workload", "edge"), ("--sweep", "batch=1,2")):
        said = str(asked(copy, *words).exception)
        assert "is not timed: onnx/model.onnx is not the file that manifest.json lists" in said


def test_a_model_that_fails_is_named_and_the_rest_is_written(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, start = tmp_path / "copy", WorkerProcess.__enter__

    def entered(worker: WorkerProcess) -> WorkerProcess:
        if worker._name == "pruned":
            worker._end()
            raise NirvanaError("pruned: no room.")
        return start(worker)

    shutil.copytree(out, copy)
    monkeypatch.setattr(WorkerProcess, "__enter__", entered)
    few = ("--repeats", 2, "--new-tokens", 2, "--threads", 1)
    for words in (few, ("--sweep", "batch=1,2", *few)):
        shown = asked(copy, *words)
        assert isinstance(shown.exception, ContenderError) and shown.exception.exit_code == 3
        assert "pruned" in str(shown.exception) and "no room" in shown.output
    record = json.loads((copy / "benchmark.json").read_text())
    assert [one["name"] for one in record["variants"]] == ["dense"]
    assert "pruned was not timed: no room." in (copy / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--workload", "rag"), "rag: prompt_tokens = 1536 and new_tokens = 64 make 1600 tokens"),
        (("--sweep", "context=32,64,4096"), "--sweep context=32,64$"),
        (("--sweep", "context=600,700"), "--prompt-tokens N --new-tokens N"),
    ],
)
def test_what_the_context_does_not_hold_is_refused_ahead(out: Path, words: Any, said: str) -> None:
    result = asked(out, *words)
    assert isinstance(result.exception, library.NirvanaError)
    with pytest.raises(library.NirvanaError, match=said):
        raise result.exception


@pytest.mark.parametrize(
    "words",
    [
        ("--workload", "chat", "--prompt-tokens", 4),
        ("--workload", "chat", "--repeats", 4),
        ("--sweep", "batch=1,2", "--precision", "3%"),
    ],
)
def test_an_option_without_use_is_a_usage_error(out: Path, words: Any) -> None:
    result = asked(out, *words)
    assert result.exit_code == 2 and "leave it out" in result.output


def test_nothing_asked_is_an_error(out: Path) -> None:
    with pytest.raises(library.NirvanaError, match=r"No workload and no sweep.*\n.*--workload chat"):
        library.benchmark_workloads(out, Traffic())


def test_what_fails_later_takes_nothing_with_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nirvana_deploy.measure import stage

    def refusing(*args: Any, **options: Any) -> Any:
        raise library.NirvanaError("The machine is out of breath.")

    monkeypatch.setattr(stage, "measure_sweep", refusing)
    with pytest.raises(library.NirvanaError, match="out of breath"):
        library.benchmark_workloads(out, Traffic(workloads=("edge",), sweeps=("batch=1,2",)), SHORT)
    record = json.loads((out / "workloads.json").read_text())
    assert "edge" in [one["name"] for one in record["workloads"]]
    assert library.verify_folder(out).passed
