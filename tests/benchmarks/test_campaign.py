"""The campaign: its short form finds nothing, and what it looks for it would find."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from builders.extras import needs
from builders.scripts import ROOT

from nirvana_deploy.base.errors import UNFORESEEN

CAMPAIGN = ROOT / "benchmarks" / "campaign"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the campaign by its name."""
    monkeypatch.syspath_prepend(str(CAMPAIGN.parent))

    def imported(name: str) -> ModuleType:
        return importlib.import_module(f"campaign.{name}")

    return imported


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="processes are counted in /proc")
def test_the_short_form_finds_nothing(tmp_path: Path) -> None:
    needs("hypothesis")
    done = subprocess.run(
        [sys.executable, str(CAMPAIGN), "--json", str(tmp_path / "found.json")],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    subjects = {path.stem for path in CAMPAIGN.glob("subjects/[a-z]*.py")}
    assert found.keys() == subjects
    assert all(part["count"] > 0 for part in found.values() if "not_run" not in part)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


GOOD = {"words": (), "code": 0, "stdout": "", "stderr": "", "hung": "", "pid": 1, "left": (), "seconds": 0.1}
TRACE = 'Traceback (most recent call last):\n  File "/x/cli/main.py", line 9, in main\nValueError: no\n'


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"code": 1, "stderr": "Loading: 0.1 s\nError: no such file\nMake one: x\n"}, None),
        ({"code": 130, "stderr": "Interrupted."}, None),
        ({"code": -11}, "ended with SIGSEGV"),
        ({"code": 143}, "ended with exit code 143"),
        ({"code": 1, "stderr": TRACE}, "a trace: ValueError: no at cli/main.py:9"),
        ({"code": 1, "stderr": f"Error: {UNFORESEEN}: no"}, "a failure that nobody foresaw"),
        ({"stdout": TRACE}, "a trace: ValueError: no at cli/main.py:9"),
        ({"code": 1}, "exit code 1 without a message"),
        ({"stderr": "Error: all is well"}, "exit code 0 with a message"),
        ({"code": 1, "stderr": "Error: a\nError: b"}, "more than one message"),
        ({"code": 1, "stderr": "Error: a\n" + "b\n" * 10}, "a message of 11 lines"),
        ({"code": 1, "stderr": "Error: " + "x" * 5000}, "a message of 1 lines, 5007 characters"),
        ({"hung": "hung: no end", "code": -9}, "hung: no end"),
        ({"left": (12,)}, "1 processes left"),
    ],
)
def test_what_a_command_may_not_do(part: Any, change: dict[str, Any], complaint: str | None) -> None:
    found = part("trial").Outcome(**{**GOOD, **change}).complaints()
    assert not found if complaint is None else any(one.startswith(complaint) for one in found)


_WATCHED = """
import os, signal, subprocess, sys, time
from pathlib import Path
from campaign import trial
trial.IDLE_SECONDS, trial._GONE_SECONDS, trial.MEMORY_BYTES = 2, 1, 1 << 30
folder = Path(sys.argv[1])

def at_the_third() -> None:
    trial.at_event(3, folder, lambda: os.kill(os.getpid(), signal.SIGKILL))()
    for name in "abcd":
        Path(name).write_text(name)

def leaving() -> None:
    subprocess.Popen(["sleep", "60"])

def locked_out() -> None:
    trial.obey_permissions()
    Path("a").chmod(0)
    Path("a").read_text()

for work in (at_the_third, leaving, locked_out, lambda: time.sleep(60), lambda: bytearray(2 << 30)):
    print(trial.call(work, folder=folder).complaints(), sorted(path.name for path in folder.iterdir()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are counted in /proc")
def test_children_are_watched(tmp_path: Path) -> None:
    """A kill before the third file, a process left, a file that may not be read, a hang, too much memory."""
    (tmp_path / "folder").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, str(tmp_path / "folder")],
        env={**os.environ, "PYTHONPATH": f"{CAMPAIGN.parent}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    assert "SIGKILL" in lines[0] and lines[0].endswith("['a', 'b']")
    assert "1 processes left" in lines[1]
    assert "PermissionError" in lines[2]
    assert "hung: no end" in lines[3]
    assert "MemoryError" in lines[4]


def test_a_lost_changed_or_half_written_file_is_seen(part: Any, tmp_path: Path) -> None:
    world = part("world")
    reference, out = tmp_path / "reference", tmp_path / "out"
    for folder in (reference, out):
        folder.mkdir()
        (folder / "plan.json").write_text('{"schema": 1}')
        (folder / "manifest.json").write_text(f'{{"of": "{folder.name}"}}')
    (out / ".partial-x").write_text("half")
    before = world.snapshot(out)
    assert not world.differing(out, reference) and not world.missing(out, reference)
    (out / "plan.json").write_text('{"sche')
    (out / "manifest.json").write_text("{")
    (out / "model.onnx").write_text("")
    assert [one.partition(" ")[0] for one in world.differing(out, reference)] == [
        "manifest.json",
        "model.onnx",
        "plan.json",
    ]
    assert world.changes(before, world.snapshot(out))
    (out / "plan.json").unlink()
    assert world.missing(out, reference) == ["plan.json is missing"]
    assert world.temporaries(out) and not world.temporaries(reference)
    theirs = {out / "plan.json": b"", out / "manifest.json": b"mine", out / "model.onnx": b""}
    assert part("subjects.forced").lost(theirs) == ["lost: plan.json", "lost: manifest.json"]


HEADER = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".safetensors", ".toml", ".txt"])
def test_damage_is_damage_and_repeats_by_its_seed(part: Any, tmp_path: Path, suffix: str) -> None:
    whole = {
        ".json": b'{"schema": 1, "layers": [{"kept": [1, 2]}]}',
        ".jsonl": b'{"text": "one"}\n{"text": "two"}\n',
        ".safetensors": len(HEADER).to_bytes(8, "little") + HEADER + bytes(8),
        ".toml": b"schema = 1\n[pruning]\nsparsity = 0.3\n",
        ".txt": b"some words of a text",
    }[suffix]

    def damaged(seed: int) -> tuple[str, object]:
        file = tmp_path / f"file{suffix}"
        file.write_bytes(whole)
        how = part("mutations").damage(file, Random(seed))
        readable = file.is_file() and not file.is_symlink() and file.stat().st_size < 1 << 20
        found = file.read_bytes() if readable else how
        if file.is_dir():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
        return how, found

    ways = [damaged(seed) for seed in range(60)]
    assert ways == [damaged(seed) for seed in range(60)]
    assert sum(found == whole for _, found in ways) < 6  # a value drawn may be the one that stood there
    assert len({how for how, _ in ways}) > 12


def test_the_page_shows_the_record(part: Any) -> None:
    record = part("record")
    page = record.PAGE.read_text(encoding="utf-8")
    assert page == record.with_table(page, json.loads(record.RECORD.read_text(encoding="utf-8")))


def test_what_the_fuzzer_reads_with_exists() -> None:
    """It runs where atheris is; here its imports alone are tried."""
    source = ast.parse((CAMPAIGN / "fuzz_readers.py").read_text(encoding="utf-8"))
    ours = [
        node
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nirvana_deploy")
    ]
    assert ours
    for node in ours:
        module = importlib.import_module(str(node.module))
        assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_the_fuzzer_and_the_makefile_name_the_same_readers() -> None:
    source = (CAMPAIGN / "fuzz_readers.py").read_text(encoding="utf-8")
    table = source[source.index("READERS: dict") : source.index('"""Reader ->')]
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = next(line for line in make.splitlines() if "for reader in" in line)
    named = line[line.index("for reader in") :].removeprefix("for reader in ").partition(";")[0].split()
    assert named == [part.partition('"')[0] for part in table.split('    "')[1:]]
