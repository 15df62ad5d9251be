"""Stages of a run: skipped when finished, made anew with what they are needed for, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


@pytest.mark.parametrize("result", [{"pruned": {"passed": False}}, {"scheme": "int8", "passed": False}])
def test_a_failed_stage_runs_again(tmp_path: Path, result: dict[str, Any]) -> None:
    run = begun(tmp_path)
    stage = Stage("check", (), (), lambda: result)
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


def forced(out: Path, *, reads: tuple[Path, ...] = ()) -> Run:
    return Run.begin(out, options={}, model=MODEL, command="c", reads=reads, force=True)


def writing(run: Run, name: str) -> Stage:
    return Stage(name, (), (name,), lambda: (run.out / name).write_text(name) and None)


def test_a_refused_run_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("theirs")
    (tmp_path / ".partial-mine").write_text("theirs")
    for resume, force in ((False, False), (True, False), (False, True)):
        with pytest.raises(NirvanaError, match=r"nirvana-deploy did not write plan\.json"):
            Run.begin(tmp_path, options={}, model=MODEL, command="c", resume=resume, force=force)
    with pytest.raises(NirvanaError, match="the command reads"):
        forced(tmp_path, reads=(tmp_path / "model",))
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", ".partial-mine"}


@pytest.mark.parametrize(
    "text",
    [
        "theirs",
        "{}",
        '{"tool": "webpack 5", "stages": {}, "files": {}, "makes": []}',
        '{"tool": "nirvana-deploy 1", "stages": {}}',
        '{"tool": "nirvana-deploy 1", "stages": {}, "files": {}, "makes": ["../thesis"]}',
        '{"tool": "nirvana-deploy 1", "stages": {}, "files": {}, "makes": ["/etc"]}',
        '{"tool": "nirvana-deploy 1", "stages": {}, "files": {}, "makes": ["."]}',
        "[" * 9999,
    ],
)
def test_a_manifest_of_another_tool_is_theirs(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(NirvanaError, match=r"nirvana-deploy did not write manifest\.json"):
        forced(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == text


def test_a_stage_takes_no_name_of_theirs(tmp_path: Path) -> None:
    with begun(tmp_path) as run:
        (tmp_path / "quality.json").write_text("theirs")
        with pytest.raises(NirvanaError, match=r"did not write quality\.json"):
            run.run(writing(run, "quality.json"))
        assert not run.has("quality.json")
    assert (tmp_path / "quality.json").read_text() == "theirs"


def test_what_was_made_and_not_recorded_is_ours_all_the_same(tmp_path: Path) -> None:
    """As after a kill between the file and the manifest."""

    def killed() -> None:
        (tmp_path / "plan.json").write_text("made")
        raise KeyboardInterrupt

    with begun(tmp_path) as run, pytest.raises(KeyboardInterrupt):
        run.run(Stage("plan", (), ("plan.json",), killed))
    with forced(tmp_path) as run:
        run.run(writing(run, "plan.json"))
    assert (tmp_path / "plan.json").read_text() == "plan.json"


def test_a_finished_run_holds_nothing_of_the_run_before(tmp_path: Path) -> None:
    with begun(tmp_path) as run:
        for name in ("a", "b"):
            run.run(writing(run, name))
        with run.writing("recipe.toml") as file:
            file.write_text("1")
        run.finish()
    (tmp_path / "notes").write_text("theirs")
    with forced(tmp_path) as run:
        run.run(writing(run, "a"))
        assert (tmp_path / "b").exists(), "it may be wanted until all is made"
        run.finish()
        assert run.manifest["makes"] == ["a"]
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "a", "notes"}


def test_nothing_is_removed_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis").write_text("theirs")
    begun(tmp_path / "out").close()
    (tmp_path / "out/engine").symlink_to(tmp_path / "home")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    (tmp_path / "out/manifest.json").write_text(json.dumps({**manifest, "makes": ["engine/thesis"]}))
    with begun(tmp_path / "out", resume=True) as run:
        run.finish()
    assert (tmp_path / "home/thesis").read_text() == "theirs"


def test_a_second_run_is_refused_while_the_first_one_writes(tmp_path: Path) -> None:
    with begun(tmp_path) as run:
        for resume, force in ((True, False), (False, True)):
            with pytest.raises(NirvanaError, match="is being written by process"):
                Run.begin(tmp_path, options={}, model=MODEL, command="c", resume=resume, force=force)
        with pytest.raises(NirvanaError, match="is being written by process"):
            other = Run.open(tmp_path)
            other.run(writing(other, "a"))
        run.run(writing(run, "b"))
    with Run.open(tmp_path) as other:
        other.run(writing(other, "a"))
    assert set(Run.open(tmp_path).manifest["stages"]) == {"a", "b"}


def test_what_others_recorded_meanwhile_is_kept(tmp_path: Path) -> None:
    begun(tmp_path).close()
    with Run.open(tmp_path) as early, Run.open(tmp_path) as other:
        other.run(writing(other, "a"))
        other.close()
        early.run(writing(early, "b"))
    assert set(Run.open(tmp_path).manifest["stages"]) == {"a", "b"}


@pytest.mark.parametrize("problem", [NirvanaError("the text is too short"), KeyboardInterrupt()])
def test_a_run_that_is_refused_in_its_first_stage_leaves_nothing(
    tmp_path: Path, problem: BaseException
) -> None:
    """One that is interrupted can be resumed."""

    def fail() -> None:
        (out / "half").write_text("half of it")
        raise problem

    out = tmp_path / "new" / "out"
    with pytest.raises(type(problem)), begun(out) as run:
        with run.writing("recipe.toml") as file:
            file.write_text("recipe")
        run.run(Stage("a", (), ("half", "whole"), fail))
    if isinstance(problem, NirvanaError):
        assert not list(tmp_path.iterdir())
    else:
        begun(out, resume=True).close()


def test_a_run_that_begins_again_and_fails_at_once_leaves_the_one_before(tmp_path: Path) -> None:
    run_all(tmp_path, resume=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def fail() -> None:
        raise NirvanaError("the text is too short")

    with (
        pytest.raises(NirvanaError, match="too short"),
        Run.begin(tmp_path, options={}, model=MODEL, command="other", force=True) as run,
    ):
        with run.writing("recipe.toml") as file:
            file.write_text("recipe")
        run.run(Stage("e", (), ("e",), fail))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert run_all(tmp_path) == []


def test_a_resumed_run_that_is_refused_in_its_first_stage_leaves_what_was_there(tmp_path: Path) -> None:
    """With options, files and stages that it dropped on its way to it."""
    run_all(tmp_path, resume=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def fail() -> None:
        raise NirvanaError("the text is too short")

    with pytest.raises(NirvanaError, match="too short"), begun(tmp_path, resume=True, free=2) as run:
        with run.writing("recipe.toml") as file:
            file.write_text("recipe")
        run.drop(["d"])
        run.forget("b")
        run.run(Stage("b", ("a",), ("b", "new"), fail))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert run_all(tmp_path) == []


def test_a_resumed_run_that_is_through_keeps_its_files(tmp_path: Path) -> None:
    run_all(tmp_path, resume=False)
    with pytest.raises(NirvanaError, match="not good enough"), begun(tmp_path, resume=True) as run:
        with run.writing("recipe.toml") as file:
            file.write_text("recipe")
        run.finish()
        raise NirvanaError("not good enough")
    assert (tmp_path / "recipe.toml").read_text() == "recipe"


def test_a_run_that_fails_later_keeps_what_is_finished(tmp_path: Path) -> None:
    def fail() -> None:
        raise NirvanaError("no")

    with pytest.raises(NirvanaError, match="no"), begun(tmp_path) as run:
        run.run(stages(run, [])[0])
        run.run(Stage("b", ("a",), ("b",), fail))
    assert run_all(tmp_path) == ["b", "d", "c"]


def test_what_is_kept_outlasts_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match="no"), begun(tmp_path) as run:
        with run.writing("recipe.toml") as file:
            file.write_text("recipe")
        run.keep()
        raise NirvanaError("no")
    assert (tmp_path / "recipe.toml").is_file() and (tmp_path / "manifest.json").is_file()


PARALLEL = """
import os, sys, time
from pathlib import Path
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage

def record(out, name, until):
    run = Run.open(out)
    while time.monotonic() < until:
        pass
    try:
        run.run(Stage(name, (), (name,), lambda: (out / name).write_text(name) and None))
    except NirvanaError as error:
        return 1 if "is being written by" in error.message else 2
    return 0

for trial in range(int(sys.argv[2])):
    out = Path(sys.argv[1]) / str(trial)
    Run.begin(out, options={}, model={"name": "m", "files": {}}, command="c").close()
    until = time.monotonic() + 0.05
    children = []
    for name in "abcd":
        if not (child := os.fork()):
            os._exit(record(out, name, until))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(*codes)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_no_record_is_lost_to_another_writer(tmp_path: Path) -> None:
    """20 trials of four writers at once: who came through stands in the manifest, the others were told."""
    command = [sys.executable, "-c", PARALLEL, str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    trials = [[int(code) for code in line.split()] for line in done.stdout.splitlines()]
    assert len(trials) == 20 and any(1 in codes for codes in trials)
    for trial, codes in enumerate(trials):
        assert set(codes) <= {0, 1} and 0 in codes
        with Run.open(tmp_path / str(trial)) as run:
            recorded = {name for name, code in zip("abcd", codes, strict=True) if code == 0}
            assert set(run.manifest["stages"]) == recorded
            for name in {*"abcd"} - recorded:
                run.run(writing(run, name))
            assert set(run.manifest["stages"]) == {*"abcd"}
            assert not [name for name in run.manifest["stages"] if run.damaged(name)]
