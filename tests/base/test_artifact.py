"""Whole or not at all, and the old version comes back; a folder is replaced only when all of it is ours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nirvana_deploy.base import artifact
from nirvana_deploy.base.artifact import claim, files_under, whole_file, whole_folder, write_bytes
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.marker import MARKER


def write_folder(target: Path, **files: str) -> None:
    with whole_folder(target) as folder:
        for name, text in files.items():
            place = folder / name.replace("__", "/")
            place.parent.mkdir(exist_ok=True)
            place.write_text(text)


def write_file(target: Path, text: str) -> None:
    with whole_file(target) as partial:
        partial.write_text(text)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_marker_names_what_was_written_and_nothing_that_varies(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_folder(tmp_path / name, b="1", a__c="2")
    marker = (tmp_path / "one" / MARKER).read_text()
    assert marker == (tmp_path / "two" / MARKER).read_text()
    assert json.loads(marker) == {"tool": "nirvana-deploy", "schema": 1, "files": ["a/c", "b"]}
    assert [path.name for path in files_under(tmp_path / "one")] == ["c", "b"]


def test_ours_is_replaced(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", a="old", b="old")
    write_folder(tmp_path / "x", a="new")
    assert [path.name for path in files_under(tmp_path / "x")] == ["a"]
    assert names_in(tmp_path) == ["x"]


@pytest.mark.parametrize("place", ["theirs", "deep/er/theirs", "a/theirs"])
def test_theirs_is_refused_before_the_work_and_after_it(tmp_path: Path, place: str) -> None:
    target = tmp_path / "x"
    write_folder(target, a__b="old")

    def put() -> None:
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        (target / place).write_text("precious")

    with pytest.raises(NirvanaError, match=f"did not write {place}"), whole_folder(target) as folder:
        (folder / "new").touch()
        put()
    with pytest.raises(NirvanaError, match=f"did not write {place}"), whole_folder(target):
        pytest.fail("the work began")
    assert contents(target)[place] == "precious" and contents(target)["a/b"] == "old"
    assert names_in(tmp_path) == ["x"]


def test_many_are_counted(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(NirvanaError, match=r"did not write 0\.txt, 1\.txt, 2\.txt and 2 more"):
        write_folder(tmp_path, a="new")


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    write_folder(tmp_path / "disk/x", a="old")
    (tmp_path / "x").symlink_to(tmp_path / "disk/x")
    write_folder(tmp_path / "x", a="new")
    assert (tmp_path / "x").is_symlink() and (tmp_path / "disk/x/a").read_text() == "new"


FAILING: list[tuple[Any, str]] = [(Path, "replace"), (artifact, "_fsync")]


@pytest.mark.parametrize(
    ("error", "late"),
    [(OSError(5, "input/output error"), False), (KeyboardInterrupt(), False), (KeyboardInterrupt(), True)],
)
@pytest.mark.parametrize(("owner", "function"), FAILING)
@pytest.mark.parametrize("write", [write_folder, write_file])
def test_the_old_version_comes_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    function: str,
    error: BaseException,
    late: bool,
    write: Callable[..., None],
) -> None:
    """Whichever call fails, or is the last before an interrupt: renames, flushes around them."""
    target = tmp_path / "x"
    is_folder = write is write_folder
    write(target, **({"a": "old"} if is_folder else {"text": "old"}))
    original = getattr(owner, function)
    for failing in range(6):
        calls = 0

        def counted(*arguments: Any, failing: int = failing) -> Any:
            nonlocal calls
            calls += 1
            if late:
                original(*arguments)
            if calls == failing + 1:
                raise error
            return None if late else original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, function, counted)
            try:
                write(target, **({"a": "new"} if is_folder else {"text": "new"}))
            except (NirvanaError, KeyboardInterrupt):
                assert (target / "a" if is_folder else target).read_text() == "old"
                assert names_in(tmp_path) == ["x"]
            else:
                break
    else:
        pytest.fail("it never came through")
    assert failing > 0 and (target / "a" if is_folder else target).read_text() == "new"


def test_an_interrupt_while_the_old_version_goes_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "x", a="old", b="old")
    original, interrupts = os.unlink, [KeyboardInterrupt()]

    def interrupted(*arguments: Any, **more: Any) -> None:
        original(*arguments, **more)
        if interrupts:
            raise interrupts.pop()

    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "x", a="new")
    assert names_in(tmp_path) == ["x"] and contents(tmp_path / "x")["a"] == "new"


def test_a_claim_is_for_names_that_are_free_or_ours(tmp_path: Path) -> None:
    claim(tmp_path, ["a", "b"])
    write_bytes(tmp_path / "a", b"ours")
    (tmp_path / "c").touch()
    claim(tmp_path, ["a"])
    with pytest.raises(NirvanaError, match="did not write c"):
        claim(tmp_path, ["a", "c"])
    (tmp_path / "c").unlink()
    write_folder(tmp_path, d="all of it was ours")
    assert set(contents(tmp_path)) == {"d", MARKER}


@pytest.mark.parametrize("text", ["mine", "[]", '{"tool": "other", "schema": 1, "files": ["a"]}', "[" * 9999])
def test_a_marker_of_another_hand_is_a_file_like_any_other(tmp_path: Path, text: str) -> None:
    (tmp_path / MARKER).write_text(text)
    with pytest.raises(NirvanaError, match=f"did not write {MARKER}"):
        write_folder(tmp_path, a="new")
    with pytest.raises(NirvanaError, match=f"did not write {MARKER}"):
        claim(tmp_path, ["a"])
    assert (tmp_path / MARKER).read_text() == text
