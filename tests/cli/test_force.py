"""--force never costs a file that this tool did not write: every writing command, every kind of target."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from builders.jobs import SHORT
from click.testing import CliRunner

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.marker import MARKER
from nirvana_deploy.cli.main import commands
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.layout import NAMES_OF_A_RUN
from nirvana_deploy.pipeline.prune_export import prune_export


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX folder and an output folder with a checkpoint, both ours."""
    folder = tmp_path_factory.mktemp("made")
    onnx_from_checkpoint(Checkpoint.open(tiny_llama), folder / "onnx")
    options = {**SHORT, "sparsity": 0.3, "num_sequences": 4, "seq_len": 16}
    prune_export(str(tiny_llama), out=folder / "run", until="checkpoint", **options)
    return folder


@pytest.fixture
def world(made: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's home and working folder, a model, and folders of ours, one with files of theirs."""
    base = tmp_path / "world"
    shutil.copytree(tiny_llama, base / "models/llama")
    shutil.copytree(made / "onnx", base / "ours/onnx")
    shutil.copytree(made / "onnx", base / "ours/mixed")
    shutil.copytree(made / "run", base / "ours/run")
    texts = (
        "home/letter.txt",
        "home/thesis/thesis.tex",
        "home/thesis/chapters/one.tex",
        "home/.hidden/key",
        "desk/notes.txt",
        "desk/list.txt",
        "models/readme.txt",
        "models/llama/own/figure.svg",
        "ours/mixed/notes.txt",
        "elsewhere/model.onnx",
        "elsewhere/deep/er/only.txt",
        "other/manifest.json",
        "other/checkpoint/config.json",
        "lookalike/" + MARKER,
    )
    for name in texts:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(f"theirs: {name}")
    (base / "empty-inside/a/b").mkdir(parents=True)
    (base / "links").mkdir()
    for name in ("home", "home/thesis", "models/llama", "desk"):
        (base / "links" / Path(name).name).symlink_to(base / name)
    (base / "linked").mkdir()
    (base / "linked/thesis").symlink_to(base / "home/thesis")
    monkeypatch.setenv("HOME", str(base / "home"))
    monkeypatch.chdir(base / "desk")
    return base


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder, links not followed."""

    def entries() -> Iterator[tuple[str, str]]:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                yield name, f"-> {path.readlink()}"
            else:
                yield name, "/" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()

    return dict(entries())


PROTECTED = (
    "/",
    "home",
    ".",
    "models",
    "models/llama",
    "models/llama/own",
    "models/llama/new",
    "desk",
    "desk/../desk",
    "links/home",
    "links/llama",
    "links/desk",
)
"""Refused whatever lies there."""
FOREIGN = (
    "home/thesis",
    "home/letter.txt",
    "home/.hidden",
    "links/thesis",
    "linked",
    "elsewhere",
    "other",
    "lookalike",
    "empty-inside",
    "ours/mixed",
    "ours/run",
)
"""Not replaced, for somebody else's files lie there."""
WRITERS: dict[str, str] = {
    "export": "export {world}/models/llama",
    "export fp16": "export ../models/llama --dtype fp16",
    "quantize": "quantize {world}/models/llama --scheme w8",
    "quantize text": "quantize {world}/models/llama --scheme int8 --calib list.txt",
    "gguf": "package {world}/models/llama --gguf",
    "triton": "package {world}/models/llama --triton",
    "openvino": "package {world}/models/llama --openvino",
}
"""Commands that replace what ``--out`` names; a folder of ours with a model in it serves them all."""
RUNS: dict[str, str] = {
    "prune-export": "prune-export {world}/models/llama --sparsity 0.3",
    "prune": "prune {world}/models/llama --sparsity 0.3",
    "prune --plan": "prune {world}/models/llama --plan {world}/ours/run/plan.json",
}


def refused(world: Path, command: str, out: Path | str) -> NirvanaError:
    """Run a command with --force; it ends with a sentence, and nothing has changed anywhere."""
    before = tree(world)
    words = [*command.format(world=world).split(), "--out", str(out), "--force"]
    result = CliRunner().invoke(commands, words)
    assert isinstance(result.exception, NirvanaError), result.output
    assert result.exit_code == 1 and result.exception.exit_code == 1
    assert tree(world) == before
    return result.exception


def placed(world: Path, target: str) -> Path:
    return Path(target) if target == "/" else world / target


@pytest.mark.parametrize("target", [*PROTECTED, *FOREIGN])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_replaces_nothing_of_theirs(world: Path, writer: str, target: str) -> None:
    for file in (world / "ours/onnx").iterdir():  # the model is an ONNX folder as well
        if not (world / "models/llama" / file.name).exists():
            shutil.copyfile(file, world / "models/llama" / file.name)
    error = refused(world, WRITERS[writer], placed(world, target))
    told = "cannot be written" if target in PROTECTED else "is not replaced, with --force or without"
    assert told in error.message and "--out" in str(error.hint)


@pytest.mark.parametrize("target", PROTECTED)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_begins_in_no_protected_place(world: Path, run: str, target: str) -> None:
    assert "cannot be written" in refused(world, RUNS[run], placed(world, target)).message


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("name", NAMES_OF_A_RUN)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_names_what_stands_in_its_way(world: Path, run: str, name: str, as_folder: bool) -> None:
    name = name.replace("[0-9]*", "1").replace("*", "int8")
    theirs = world / "home/thesis" / name / "one.tex" if as_folder else world / "home/thesis" / name
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_text("theirs")
    error = refused(world, RUNS[run], world / "home/thesis")
    assert f"did not write {name}" in error.message


@pytest.mark.parametrize("place", ["checkpoint/notes.txt", "checkpoint/deep/notes.txt", "onnx/notes.txt"])
@pytest.mark.parametrize("run", ["prune-export", "prune"])
def test_a_file_inside_what_an_earlier_run_made_is_kept(world: Path, run: str, place: str) -> None:
    theirs = world / "ours/run" / place
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_text("theirs")
    assert "nirvana-deploy did not write" in refused(world, RUNS[run], world / "ours/run").message


def test_the_plan_that_is_read_is_not_written_over(world: Path) -> None:
    error = refused(world, RUNS["prune --plan"], world / "ours/run")
    assert "it contains" in error.message and "plan.json, which the command reads" in error.message


@pytest.mark.parametrize("out", ["{world}/desk/calib.txt", "{world}/texts"])
def test_the_text_that_is_read_is_not_written_over(world: Path, out: str) -> None:
    for name in ("desk/calib.txt", "texts/calib.txt"):
        (world / name).parent.mkdir(exist_ok=True)
        (world / name).write_text("words " * 400)
    calib = "calib.txt" if "desk" in out else f"{world}/texts/calib.txt"
    command = f"prune {{world}}/models/llama --sparsity 0.3 --calib {calib}"
    assert "the command reads" in refused(world, command, out.format(world=world)).message


@pytest.mark.parametrize("name", ["onnx.engine", "onnx.json", "onnx.log", "onnx-decoder.engine", MARKER])
def test_an_engine_takes_no_name_that_is_theirs(world: Path, name: str) -> None:
    (world / "engines").mkdir()
    (world / "engines" / name).write_text("theirs")
    (world / "engines/onnx.engine").write_text("theirs too")
    command = "build-engine {world}/ours/onnx"
    assert "nirvana-deploy did not write" in refused(world, command, world / "engines").message


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_a_report_takes_no_name_that_is_theirs(world: Path, name: str) -> None:
    for folder, keep in (("run", True), ("records", False)):
        place = world / "ours" / folder
        if not keep:
            place.mkdir()
            shutil.copyfile(world / "ours/run/plan.json", place / "plan.json")
        (place / name).write_text("theirs")
        before = tree(world)
        result = CliRunner().invoke(commands, ["report", str(place)])
        assert isinstance(result.exception, NirvanaError) and name in result.exception.message
        assert tree(world) == before


def test_a_mount_point_is_not_replaced(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == world / "ours/onnx")
    error = refused(world, WRITERS["export"], world / "ours/onnx")
    assert "mount point" in error.message and "ours/onnx/NAME" in str(error.hint)


def _export(world: Path, *more: str) -> list[str]:
    return ["export", str(world / "models/llama"), "--out", str(world / "ours/onnx"), *more]


def test_ours_is_replaced_with_force_alone(world: Path) -> None:
    before = tree(world)
    again = CliRunner().invoke(commands, _export(world))
    assert isinstance(again.exception, NirvanaError) and "--force" in str(again.exception.hint)
    assert tree(world) == before
    assert CliRunner().invoke(commands, _export(world, "--force")).exit_code == 0
    once = tree(world)
    assert once.keys() - before.keys() == {"ours/onnx/README.md"}  # the library writes no card
    assert CliRunner().invoke(commands, _export(world, "--force")).exit_code == 0
    assert tree(world) == once  # the same bytes, marker included


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (lambda file: file.write_text("theirs"), "did not write it"),
        (lambda file: file.write_bytes(b"GGUF" + bytes(5000)), "did not write it"),
        (lambda file: file.mkdir(), "did not write it"),
    ],
)
def test_a_gguf_file_of_somebody_else_is_kept(
    world: Path, lose: Callable[[Path], object], message: str
) -> None:
    lose(world / "other/x.gguf")
    assert message in refused(world, "package {world}/ours/run --gguf", world / "other/x.gguf").message


def test_a_run_that_starts_again_leaves_their_files_and_nothing_old(world: Path) -> None:
    run = world / "ours/run"
    (run / "notes.txt").write_text("theirs")
    command = [*RUNS["prune --plan"].format(world=world).split(), "--out", str(run), "--force"]
    shutil.copyfile(run / "plan.json", world / "elsewhere/plan.json")
    command[command.index("--plan") + 1] = str(world / "elsewhere/plan.json")
    result = CliRunner().invoke(commands, command)
    assert result.exit_code == 0, result.output
    left = {path.name for path in run.iterdir()}
    assert left == {"notes.txt", "manifest.json", "plan.json", "checkpoint"}
