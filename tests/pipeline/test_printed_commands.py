"""The commands that a report prints for what it lacks, typed where it says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from builders.jobs import TINY_JOB
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
    move, and_then, typed = command.partition(" && ")
    assert and_then and move.startswith("cd ")
    monkeypatch.chdir(out / move.removeprefix("cd "))
    program, *words = shlex.split(typed)
    assert program == "nirvana-deploy"
    done = CliRunner().invoke(commands, words)
    assert done.exit_code == 0, done.output
    return str(missing)
