"""Help pages speak one language: read from the commands, as a user does."""

from __future__ import annotations

import re

import click
import pytest

from nirvana_deploy.cli.main import _COMMANDS, commands

PROGRAM = re.compile(r"^    (?:nirvana-deploy|torchrun) ", re.MULTILINE)


def page_of(name: str) -> str:
    context = click.Context(commands, info_name="nirvana-deploy", terminal_width=80)
    command = commands.get_command(context, name)
    assert command is not None
    return command.get_help(click.Context(command, parent=context, info_name=name, terminal_width=80))


@pytest.mark.parametrize("name", _COMMANDS)
def test_a_page_is_whole_and_fits_a_terminal(name: str) -> None:
    page = page_of(name)
    assert not re.search(r"\\b|``|\bTODO\b", page)
    examples = page.partition("Example")[2].partition("\n\n")[0]
    assert examples.startswith("s:\n") == (len(PROGRAM.findall(examples)) > 1)
    options = page.partition("\nOptions:\n")[2]
    named = [line for line in options.splitlines() if not line.startswith("  --runtime [")]
    assert max(map(len, named)) <= 80


@pytest.mark.parametrize("name", _COMMANDS)
def test_an_option_is_explained_in_a_sentence_and_its_default_in_brackets(name: str) -> None:
    command = commands.get_command(click.Context(commands), name)
    assert command is not None
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        assert option.help and option.help.endswith("."), option.name
        assert option.help[0].isupper() or re.match(r"\w[\w, -]*: ", option.help), option.name
        extra = option.get_help_extra(click.Context(command))
        assert not extra.get("default", "").startswith("("), option.name
        assert "RANGE" not in option.make_metavar(click.Context(command)), option.name
