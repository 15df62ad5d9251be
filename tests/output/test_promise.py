"""Complete, of one run, and nothing beside what is listed: each way to fall short is a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nirvana_deploy.base.artifact import whole_folder
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.output.promise import incomplete, unlisted
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage

MODEL = {"name": "m", "files": {}, "path": "/nowhere"}


def begun(out: Path, **how: bool) -> Run:
    return Run.begin(out, options={}, model=MODEL, command="c", **how)


def stage_of(run: Run, name: str, *, makes: str | None = None) -> Stage:
    makes = makes or name

    def work() -> None:
        with whole_folder(run.out / makes) as folder:
            (folder / "file").write_text(name)

    return Stage(name, (), (makes,), work)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A finished run of three stages, and a recipe."""
    with begun(tmp_path / "out") as run:
        with run.writing("recipe.toml") as file:
            file.write_text("1")
        for name, makes in (("checkpoint", None), ("onnx", None), ("dense-onnx", "dense/onnx")):
            run.run(stage_of(run, name, makes=makes))
        run.run(Stage("report", (), (), lambda: None))
        run.finish()
    return tmp_path / "out"


def said(out: Path) -> str:
    return (incomplete(Run.open(out)) or "complete").removeprefix(f"{out} ")


def edit(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_a_finished_run_is_complete(whole: Path) -> None:
    run = Run.open(whole)
    assert said(whole) == "complete" and unlisted(run) == [] and run.damaged() == []
    assert set(run.listed()) == {"recipe.toml", "checkpoint/file", "onnx/file", "dense/onnx/file"}
    with Run.open(whole) as later:  # as quantize does: a stage more
        later.run(stage_of(later, "onnx-w8"), redo=True)
    assert said(whole) == "complete" and unlisted(Run.open(whole)) == []


def test_a_run_that_starts_again_is_not_what_was_there(whole: Path) -> None:
    begun(whole, force=True).close()
    assert said(whole) == "is incomplete: no stage is finished."
    assert unlisted(Run.open(whole)) == ["checkpoint/file", "dense/onnx/file", "onnx/file", "recipe.toml"]
    with begun(whole, resume=True) as run:
        run.run(stage_of(run, "checkpoint"))
        run.run(Stage("report", (), (), lambda: None))
    assert said(whole) == "is incomplete: the last stage is checkpoint."


def test_a_run_that_goes_on_is_incomplete_until_it_is_finished(whole: Path) -> None:
    with begun(whole, resume=True) as run:
        run.run(stage_of(run, "onnx-int8"))
        assert "is incomplete: the last stage is " in said(whole)
        for name, makes in (("checkpoint", None), ("onnx", None), ("dense-onnx", "dense/onnx")):
            run.run(stage_of(run, name, makes=makes))
        run.finish()
    assert said(whole) == "complete"


def test_a_checkpoint_alone_was_never_exported(tmp_path: Path) -> None:
    with begun(tmp_path) as run:
        run.run(stage_of(run, "checkpoint"))
        run.finish()
    assert said(tmp_path) == "was never exported: it has a checkpoint and no ONNX model."


def test_records_are_of_one_run(whole: Path) -> None:
    edit(whole, lambda manifest: manifest["stages"]["onnx"].update(run="another"))
    assert said(whole) == "holds records of more than one run: stage onnx is of another."
    edit(whole, lambda manifest: [stage.pop("run") for stage in manifest["stages"].values()])
    assert "more than one run: stage checkpoint" in said(whole)


def test_a_manifest_that_does_not_say_that_it_is_complete_is_not(whole: Path) -> None:
    edit(whole, lambda manifest: manifest.pop("complete"))
    assert said(whole) == "is incomplete: the last stage is dense-onnx."


@pytest.mark.parametrize("value", [None, 1, "true", []])
def test_only_true_is_complete(whole: Path, value: object) -> None:
    edit(whole, lambda manifest: manifest.update(complete=value))
    with pytest.raises(NirvanaError, match=r"manifest\.json: complete is .*, not true or false\."):
        said(whole)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("checkpoint/model.bin", True),
        ("onnx/deep/extra.onnx", True),
        ("onnx-w4/model.onnx", True),
        ("dense/onnx/x", True),
        ("plan.json", True),
        ("report.html", True),
        ("notes.txt", False),
        ("thesis/checkpoint", False),
        ("engine/notes.txt", False),
        ("dense/notes.txt", False),
    ],
)
def test_a_file_under_a_name_of_ours_is_listed(whole: Path, name: str, counts: bool) -> None:
    (whole / name).parent.mkdir(parents=True, exist_ok=True)
    (whole / name).write_text("theirs")
    assert unlisted(Run.open(whole)) == [name] * counts


def test_what_belongs_to_no_stage_is_checked_too(whole: Path) -> None:
    (whole / "recipe.toml").write_text("2")
    assert Run.open(whole).damaged() == ["recipe.toml"]
    with Run.open(whole) as run:  # and once a stage makes it, it is that stage's
        run.run(Stage("other", (), ("recipe.toml",), lambda: None))
    assert Run.open(whole).manifest["files"] == {} and Run.open(whole).damaged() == []
