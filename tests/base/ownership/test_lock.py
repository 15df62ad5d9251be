"""One writer a folder: the kernel says who, and forgets the dead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builders.unix import forked, named_pipe

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.lock import LOCK, FolderLock

HOLD = (
    "import sys, time; from pathlib import Path; from nirvana_deploy.base.ownership.lock import FolderLock\n"
    "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
)


def test_the_second_is_told_who_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(NirvanaError, match=rf"is being written by process {other.pid} \(.*{tmp_path}"):
            FolderLock(tmp_path)
        other.kill()
    FolderLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_it_is_let_go_once(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as lock, pytest.raises(NirvanaError, match=f"process {os.getpid()}"):
        FolderLock(tmp_path)
    with FolderLock(tmp_path):
        lock.release()
        with pytest.raises(NirvanaError, match="is being written"):
            FolderLock(tmp_path)


def test_a_fork_does_not_let_go(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    if not (child := forked()):
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(NirvanaError, match="is being written"):
        FolderLock(tmp_path)
    lock.release()


def test_what_stands_in_the_file_is_not_trusted(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        for said, told in (
            (b"", "by another process"),
            (b'{"pid": "x", "command": 1}', "by another process"),
            (b'{"pid": 7, "command": "a\\u001b[2Jb"}', r"by process 7 \(a\[2Jb\)"),
        ):
            (tmp_path / LOCK).write_bytes(said)
            with pytest.raises(NirvanaError, match=told):
                FolderLock(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, named_pipe, lambda path: path.symlink_to("thesis.txt")])
def test_nothing_that_stands_under_its_name_is_emptied(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    make(tmp_path / LOCK)
    with pytest.raises(NirvanaError, match=r"\.lock is no file of this tool.*\nMove it away\."):
        FolderLock(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
