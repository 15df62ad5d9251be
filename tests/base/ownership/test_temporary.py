"""Temporaries: named after their process, removed when it is gone, and never somebody else's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nirvana_deploy.base.ownership import temporary
from nirvana_deploy.base.ownership.temporary import (
    is_abandoned,
    remove_abandoned,
    scratch_folder,
    temporary_beside,
)

MAKE = (
    "import sys, time; from pathlib import Path\n"
    "from nirvana_deploy.base.ownership.temporary import temporary_beside\n"
    "for kind in ('new', 'old'):\n"
    "    path = temporary_beside(Path(sys.argv[1]), kind=kind); path.mkdir(); (path / kind).touch()\n"
    "print('made', flush=True); time.sleep(60)"
)


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that writes ``target`` and has moved the old one aside; to be killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE, str(tmp_path / "target")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "made\n"
    return process


def test_what_a_process_writes_is_left_to_it_until_it_is_gone(
    other: subprocess.Popen[str], tmp_path: Path
) -> None:
    with other:
        remove_abandoned(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        other.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked for it
        remove_abandoned(tmp_path)
    (target,) = tmp_path.iterdir()
    assert target.name == "target" and (target / "old").exists(), "what was moved aside came back"


def test_what_has_taken_its_place_stays(other: subprocess.Popen[str], tmp_path: Path) -> None:
    with other:
        other.kill()
    (tmp_path / "target").mkdir()
    remove_abandoned(tmp_path, "another")
    assert len(list(tmp_path.iterdir())) == 3
    remove_abandoned(tmp_path, "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert not list((tmp_path / "target").iterdir())


@pytest.mark.parametrize(
    "name", [".partial-thesis", ".partial-1-model", ".partial-00000000.1.1.00000000.new-x", "notes"]
)
def test_a_name_of_another_machine_or_hand_is_never_abandoned(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("theirs")
    remove_abandoned(tmp_path)
    assert not is_abandoned(name) and (tmp_path / name).read_text() == "theirs"


def test_a_process_id_that_is_used_again_is_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = temporary_beside(tmp_path / "x")
    assert not is_abandoned(mine.name)
    host, pid, start, rest = mine.name.split(".", 1)[1].split(".", 3)
    before = f".{host}.{pid}.{int(start) - 2 * temporary._CLOCK_SECONDS}.{rest}"
    assert is_abandoned(before) and mine.name == f".{host}.{pid}.{start}.{rest}"


def test_a_scratch_folder_is_empty_and_goes(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "in") as folder:
        assert folder.parent == tmp_path / "in" and not list(folder.iterdir())
        (folder / "file").touch()
    assert not list((tmp_path / "in").iterdir())
