"""Whatever a file is called or says, a command prints no control character."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.scripts import ROOT
from builders.tiny import write_tiny

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.child import child_environment
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.cli.common import TerminalProgress, echo_piece, echo_table
from nirvana_deploy.cli.main import main

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b1m\u202e"

Run = Callable[..., str]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """All that a command of this process writes to both streams."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["nirvana-deploy", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit):
            main()
        return "".join(capfd.readouterr())

    return run


def unsafe(text: str) -> set[str]:
    return {c for c in text if c in "\x1b\x07\x9b\u202e\r\b"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", f"no{EVIL}where"],
        ["verify", f"no{EVIL}where"],
        [f"ver{EVIL}ify"],
        ["export", f"./no{EVIL}where", "--out", "x"],
        ["prune-export", "smollm2", "--sparsity", f"0{EVIL}4"],
    ],
)
def test_what_is_typed_or_expanded_by_a_shell(
    printed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = printed(*arguments)
    assert r"\x1b]0;owned" in text and not unsafe(text)


def test_names_of_folders_and_what_their_files_say(
    printed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_tiny(Path(f"m{EVIL}"), "llama-tied")
    text = printed("export", f"./{model}", "--out", f"out{EVIL}")
    assert "nodes" in text and not unsafe(text)
    config = read_json(model / "config.json")
    write_json(model / "config.json", config | {"model_type": f"x{EVIL}"})
    text = printed("export", f"./{model}", "--out", "other")
    assert r"\x1b]0;owned" in text and not unsafe(text)


def test_progress_and_tables(capfd: pytest.CaptureFixture[str]) -> None:
    progress = TerminalProgress()
    with progress.task(f"label {EVIL}", total=1):
        progress.note(f"note {EVIL}")
    echo_table([f"head {EVIL}"], [[f"cell {EVIL} [red]"]], title=f"title {EVIL}")
    text = "".join(capfd.readouterr())
    assert text.count(r"\x1b]0;owned") == 5 and "[red]" in text and not unsafe(text)


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    """What is drawn on a terminal has escape sequences of its own, none of which is the label's."""
    code = (
        "from rich.console import Console\n"
        "from nirvana_deploy.cli import common\n"
        "own = common.terminal\n"
        "common.terminal = lambda **s: own(force_terminal=True, **s)\n"
        f"with common.TerminalProgress().task({EVIL!r}, total=1) as advance: advance(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert r"\x1b]0;owned" in done.stderr
    assert not any(ours in done.stderr for ours in ("\x1b]0", "\x07", "\x1b[2J", "\x9b", "\u202e"))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(io.StringIO, "a\x1b[2J"), (_Terminal, r"a\x1b[2J")])
def test_generated_text_is_harmless_on_a_terminal_and_exact_in_a_file(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], shown: str
) -> None:
    written = stream()
    monkeypatch.setattr(sys, "stdout", written)
    echo_piece("a\x1b[2J")
    assert written.getvalue() == shown


def test_commands_print_through_one_place() -> None:
    def prints(node: Any) -> bool:
        named = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        return named in {"click.echo", "click.secho", "print", "Console", "sys.stdout.write"}

    printing = {
        path.name
        for path in ROOT.glob("cli/*.py")
        if any(map(prints, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert printing == {"common.py"}


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_what_a_pipe_cannot_encode_is_a_question_mark(encoding: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    text = (ROOT / "tests/report/data/plan.json").read_text(encoding="utf-8")
    plan.write_text(text.replace('"smollm2"', '"\u30e2\u30c7\u30eb"'), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "nirvana_deploy", "inspect", str(plan)],
        env={**child_environment(), "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b" of " in done.stdout and b"???" in done.stdout
