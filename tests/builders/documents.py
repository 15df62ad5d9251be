"""The pages of this project, and the commands and snippets on them."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from builders.scripts import ROOT
from nirvana_deploy.cli.arguments import Folder
from nirvana_deploy.cli.main import commands

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/NOTES.md",
    "benchmarks/campaign/README.md",
    "nirvana_deploy/README.md",
    "SECURITY.md",
)
SITE = tuple(sorted(page.relative_to(ROOT).as_posix() for page in ROOT.glob("docs/**/*.md")))
"""Pages of the documentation site, whose links tests/docs/test_site.py follows."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language == kind]


CALLED = re.compile(r"^(?:nirvana-deploy|torchrun .*-m nirvana_deploy) (?P<words>.*)$", re.MULTILINE)


def lines_of(page: str) -> list[str]:
    """The command lines of a page without their comments: those of its code blocks that name no language."""
    text = "\n".join(blocks(page, "")).replace("\\\n", " ")
    return [
        " ".join(line.split())
        for line in re.sub(r" +# .*$", "", text, flags=re.MULTILINE).splitlines()
        if line
    ]


def commands_of(page: str) -> Iterator[list[str]]:
    """The words of each ``nirvana-deploy`` command in the code blocks."""
    for block in blocks(page, ""):
        yield from commands_in(block)


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of each ``nirvana-deploy`` command that begins a line, up to a pipe or redirection."""
    for called in CALLED.finditer(text):
        words = shlex.split(called["words"], comments=True)
        yield list(itertools.takewhile(lambda word: word not in {"|", ">"}, words))


def command_named(name: str) -> click.Command:
    command = commands.get_command(click.Context(commands), name)
    assert command is not None, name
    return command


def parse(words: list[str]) -> None:
    """Parse a command line as the command would, wherever its files are; raises what click raises."""
    name, *arguments = words
    with pytest.MonkeyPatch.context() as patched:
        for kind in (click.Path, Folder):
            patched.setattr(kind, "convert", lambda self, value, param, ctx: Path(value))
        command_named(name).make_context(name, arguments)
