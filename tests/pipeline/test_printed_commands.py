"""The commands that reports and searches print, typed where they say."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from builders.jobs import TINY_JOB, write_short_recipe
from builders.tiny import write_tiny
from click.testing import CliRunner

from nirvana_deploy.cli.main import commands
from nirvana_deploy.pipeline.folder import report_folder
from nirvana_deploy.pipeline.prune_export import prune_export

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the genai bindings while they load
]


def test_a_killed_job_goes_on_and_is_completed_by_what_its_report_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "model", "llama-tied")
    monkeypatch.chdir(tmp_path)

    def killed(*_arguments: object, **_keywords: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nirvana_deploy.pipeline.prune_export.verify", killed)
        prune_export("./model", out="runs/my job", baseline=False, **TINY_JOB)
    out = tmp_path / "runs" / "my job"
    monkeypatch.chdir(tmp_path / "runs")  # wherever the report is asked for
    report_folder(Path("my job"))

    assert "not finished" in typed_inside(out, monkeypatch)
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["complete"] is True
    assert "the dense baseline was not measured" in typed_inside(out, monkeypatch)
    record = json.loads((out / "benchmark.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in record["variants"]] == ["dense", "pruned"]
    assert "Not in this report" not in (out / "report.md").read_text(encoding="utf-8")


def typed_inside(out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Do what the only gap of a folder's report prints; returns what is missing."""
    page = (out / "report.md").read_text(encoding="utf-8")
    [(missing, command)] = re.findall(r"^- (.*) Inside this folder: `(.*)`$", page, flags=re.MULTILINE)
    assert command.startswith("cd ")
    typed(command, out, monkeypatch)
    return str(missing)


def typed(command: str, where: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Type ``command`` in the folder ``where``, a change of folder first, if any; returns its output."""
    move, _, asked = command.rpartition(" && ")
    monkeypatch.chdir(where / "".join(shlex.split(move)[1:]))
    program, *words = shlex.split(asked)
    assert program == "nirvana-deploy"
    done = CliRunner().invoke(commands, words)
    assert done.exit_code == 0, (command, done.output, done.exception)
    return done.output


def test_a_search_prints_what_runs_and_makes_its_point_there_and_on_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a cut, whose folder is completed, and for the dense model in w4, which comes out the same."""
    write_tiny(tmp_path / "model", "llama-tied")
    monkeypatch.chdir(tmp_path)
    short = {name: value for name, value in TINY_JOB.items() if name != "sparsity"}
    write_short_recipe(Path("model"), Path("my.toml"), **short, sparsity=0.3, run_benchmark=False)
    out = tmp_path / "my runs" / "search"
    asked = (
        "nirvana-deploy search --recipe my.toml --sparsity 0,0.3 --precision none,w4 --out 'my runs/search'"
    )
    said = typed(f"{asked} --max-kl 100", tmp_path, monkeypatch)
    record = json.loads((out / "search.json").read_text(encoding="utf-8"))
    assert record["recommended"] == "s0.3-w4"
    page = html.unescape((out / "search.html").read_text(encoding="utf-8"))
    assert "Typed in the folder of this page" in page and record["next_typed_in"] == "the folder of this file"
    printed = re.findall(r"^  (nirvana-deploy .*)$", said, flags=re.MULTILINE)
    assert [shlex.split(command)[1] for command in printed] == ["generate", "prune-export"]
    for command in printed:
        typed(command, tmp_path, monkeypatch)
    assert (out / "s0.3/report.html").is_file()
    (out / "s0.3/report.html").unlink()
    for command in record["next"]:
        assert command in page
        typed(command, out, monkeypatch)

    kl = {one["name"]: one["kl"] for one in record["points"]}
    said = typed(f"{asked} --resume --max-kl {kl['dense-w4'] * 1.01}", tmp_path, monkeypatch)
    record = json.loads((out / "search.json").read_text(encoding="utf-8"))
    assert record["recommended"] == "dense-w4"
    printed = re.findall(r"^  (nirvana-deploy .*)$", said, flags=re.MULTILINE)
    assert [shlex.split(command)[1] for command in printed] == ["generate", "export", "quantize"]
    for command in printed:
        typed(command, tmp_path, monkeypatch)
    made = tmp_path / "dense-onnx-w4/model.onnx.data"
    assert made.read_bytes() == (out / "s0.3/dense/onnx-w4/model.onnx.data").read_bytes()
    for folder in ("dense-onnx", "dense-onnx-w4"):
        shutil.rmtree(tmp_path / folder)
    for command in record["next"]:
        typed(command, out, monkeypatch)
    assert made.is_file()
