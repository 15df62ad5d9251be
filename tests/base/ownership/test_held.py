"""What is written whole has one writer; what was made around it for nothing goes again."""

from __future__ import annotations

from pathlib import Path

import pytest

from nirvana_deploy.base.artifact import whole_folder
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.held import held


def test_the_second_writer_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "new" / "onnx"
    with held(target, force=False):
        with (
            pytest.raises(NirvanaError, match=rf"{target} is being written by process \d+"),
            held(target, force=True),
        ):
            pass
        with held(target.with_name("other"), force=False), whole_folder(target) as folder:
            (folder / "model.onnx").touch()
    assert [path.name for path in target.parent.iterdir()] == ["onnx"]
    with pytest.raises(NirvanaError, match="exists already"), held(target, force=False):
        pass
    with held(target, force=True):
        pass


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "onnx"
    lock = "nirvana_deploy.base.ownership.held.FolderLock"

    class Late:
        def __init__(self, folder: Path, *, beside: bool) -> None:
            folder.mkdir()

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(lock, Late)
    with pytest.raises(NirvanaError, match="exists already"), held(target, force=False):
        pytest.fail("it was there")


def test_folders_made_for_nothing_go(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), held(tmp_path / "a" / "b" / "onnx", force=False):
        assert (tmp_path / "a" / "b").is_dir()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
