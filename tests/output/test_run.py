"""Stages of a run: skipped when finished, made anew with what they are needed for, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage

MODEL = {"name": "m", "files": {}}


def begun(out: Path, *, resume: bool = False, **options: Any) -> Run:
    return Run.begin(
        out, options=options, model=MODEL, command="c", may_change={"free"}, resume=resume, force=False
    )


def stages(run: Run, log: list[str]) -> list[Stage]:
    """a -> b -> c, and d beside them."""

    def writing(name: str) -> Any:
        def work() -> dict[str, Any]:
            log.append(name)
            (run.out / name).write_text(name)
            return {"name": name}

        return work

    needs: dict[str, tuple[str, ...]] = {"a": (), "b": ("a", "never-run"), "d": (), "c": ("b",)}
    return [Stage(name, needed, (name,), writing(name)) for name, needed in needs.items()]


def run_all(out: Path, *, resume: bool = True) -> list[str]:
    log: list[str] = []
    run = begun(out, resume=resume)
    for stage in stages(run, log):
        assert run.run(stage) == {"name": stage.name}
    return log


def test_finished_stages_are_skipped(tmp_path: Path) -> None:
    assert run_all(tmp_path, resume=False) == ["a", "b", "d", "c"]
    assert run_all(tmp_path) == []
    recorded = json.loads((tmp_path / "manifest.json").read_text())["stages"]
    assert recorded["b"]["needs"] == ["a"] and recorded["c"]["needs"] == ["b"]


@pytest.mark.parametrize(("damaged", "again"), [("a", ["a", "b", "c"]), ("b", ["b", "c"]), ("d", ["d"])])
def test_what_needs_a_stage_is_made_anew_with_it(tmp_path: Path, damaged: str, again: list[str]) -> None:
    run_all(tmp_path, resume=False)
    (tmp_path / damaged).write_text("something else")
    assert run_all(tmp_path) == again
    assert list(json.loads((tmp_path / "manifest.json").read_text())["stages"]) == ["a", "b", "d", "c"]


def test_a_stage_that_is_new_makes_anew_what_did_without_it(tmp_path: Path) -> None:
    run_all(tmp_path, resume=False)
    log: list[str] = []
    run = begun(tmp_path, resume=True)
    run.run(Stage("never-run", (), (), lambda: None))
    for stage in stages(run, log):
        run.run(stage)
    assert log == ["b", "c"]


def test_what_needs_it_is_forgotten_before_the_work(tmp_path: Path) -> None:
    run_all(tmp_path, resume=False)
    (tmp_path / "a").unlink()
    run = begun(tmp_path, resume=True)

    def fails() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(Stage("a", (), ("a",), fails))
    assert set(Run.open(tmp_path).manifest["stages"]) == {"d"}


def test_a_manifest_without_needs_is_taken_to_need_all_before(tmp_path: Path) -> None:
    run_all(tmp_path, resume=False)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    for stage in manifest["stages"].values():
        del stage["needs"]
    path.write_text(json.dumps(manifest))
    (tmp_path / "b").unlink()
    assert run_all(tmp_path) == ["b", "d", "c"]


def test_a_failed_stage_runs_again(tmp_path: Path) -> None:
    run = begun(tmp_path)
    stage = Stage("check", (), (), lambda: {"pruned": {"passed": False}})
    run.run(stage)
    assert not run.finished("check")


def test_redone_alone_it_leaves_the_others(tmp_path: Path) -> None:
    run_all(tmp_path, resume=False)
    log: list[str] = []
    run = Run.open(tmp_path)
    run.run(stages(run, log)[0], redo=True)
    assert log == ["a"] and set(run.manifest["stages"]) == {"a", "b", "c", "d"}


def test_only_some_options_may_change(tmp_path: Path) -> None:
    begun(tmp_path, fixed=1, free=1)
    begun(tmp_path, resume=True, fixed=1, free=2, new=3)
    with pytest.raises(NirvanaError, match="cannot be resumed: it was made with fixed 1, not 2"):
        begun(tmp_path, resume=True, fixed=2, free=2)
