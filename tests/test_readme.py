"""The README says what the records say, and its commands and Python run."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys

import pytest
from builders.scripts import ROOT, script

from nirvana_deploy.cli.main import _COMMANDS

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def test_the_tables_are_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    readme = script("readme")
    assert readme.measured_section(json.loads(readme.RECORD.read_text())) in README
    assert readme.quality_section() in README
    assert readme.quantization_section() in README
    assert readme.export_section() in README
    assert readme.engines_section() in README
    assert readme.consumers_section() in README


def test_the_picture_is_there() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()


def test_commands_exist_and_take_their_options() -> None:
    lines = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("nirvana-deploy ")]
    assert commands
    for _, name, *arguments in commands:
        help_page = subprocess.run(
            [sys.executable, "-m", "nirvana_deploy", name, "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert all(argument in help_page for argument in arguments if argument.startswith("--"))
    for name in re.findall(r"^\| `([a-z-]+)", README, flags=re.MULTILINE):
        assert name in _COMMANDS


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("source", [block for kind, block in BLOCKS if kind == "python"])
def test_python_compiles(source: str) -> None:
    ast.parse(source)
