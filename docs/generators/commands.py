"""``:::{commands} prune search``: pages of commands, made from the click commands themselves.

Options stand under the recipe whose fields they are; its docstring is the heading.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import nirvana_deploy
from nirvana_deploy.base.recipe import fields_of
from nirvana_deploy.cli.main import commands
from nirvana_deploy.cli.options import Bytes, Listed

from .markdown import Generated, escaped

_COMPUTED = re.compile(r"^(?P<said>.*?) ?\[(?P<default>[^\]]*)\]\.?$", re.DOTALL)
"""A help text whose end says what an option without a fixed default is."""
_OF_A_RECIPE = 0.75
"""Share of a recipe's options that a command has where it takes that recipe."""


@dataclass(frozen=True)
class Command:
    """One command, taken apart."""

    name: str
    command: click.Command
    context: click.Context

    @classmethod
    def named(cls, name: str) -> Command:
        """Import a command; raises ExtensionError for an unknown name."""
        above = click.Context(commands, info_name="nirvana-deploy")
        command = commands.get_command(above, name)
        if command is None:
            raise ExtensionError(f"There is no command {name!r}.")
        return cls(name, command, click.Context(command, info_name=name, parent=above))

    @property
    def usage(self) -> str:
        """How it is called."""
        return f"nirvana-deploy {self.name} {' '.join(self.command.collect_usage_pieces(self.context))}"

    @property
    def told(self) -> tuple[list[str], str]:
        """The paragraphs of its help, and its examples, line by line."""
        paragraphs = inspect.cleandoc(self.command.help or "").split("\n\n")
        plain = [" ".join(one.split()) for one in paragraphs if not one.startswith("\b")]
        examples = [one.split("\n")[2:] for one in paragraphs if one.startswith("\b")]
        return plain, "\n".join(line.strip() for lines in examples for line in lines)

    @property
    def options(self) -> list[click.Option]:
        """What is shown of its options."""
        return [one for one in self.command.params if isinstance(one, click.Option) and not one.hidden]

    def groups(self) -> Iterator[tuple[str, list[click.Option]]]:
        """Its options by recipe, in order; those of no recipe last."""
        left = {str(one.name): one for one in self.options}
        place = {name: number for number, name in enumerate(left)}
        found = []
        for title, helps in recipes():
            had = [name for name, told in helps.items() if name in left and left[name].help == told]
            if had and len(had) >= _OF_A_RECIPE * len(helps):
                found.append((place[had[0]], title, [left.pop(name) for name in had]))
        yield from ((title, options) for _, title, options in sorted(found, key=lambda one: one[0]))
        if left:
            yield "Reading, writing and output", list(left.values())


@cache
def recipes() -> tuple[tuple[str, dict[str, str]], ...]:
    """Each recipe: what it is about, and its options' help by name; larger ones before their parts."""
    found = {}
    rooms = sorted(path.parent.name for path in Path(nirvana_deploy.__file__).parent.glob("*/recipe.py"))
    for room in rooms:
        if room == "base":  # what recipes are made of
            continue
        module = importlib.import_module(f"nirvana_deploy.{room}.recipe")
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == module.__name__:
                fields = [one for one in fields_of(kind) if one.option.command_line]
                title = inspect.getdoc(kind) or ""
                found[title.partition("\n")[0].rstrip(".")] = {one.name: one.option.help for one in fields}
    return tuple(sorted(found.items(), key=lambda one: -len(one[1])))


def page_of(name: str) -> str:
    """The Markdown of one command."""
    command = Command.named(name)
    plain, examples = command.told
    parts = [f"(command-{name})=", f"## {name}", "", *(f"{escaped(one)}\n" for one in plain)]
    parts += [f"```\n{examples}\n```", ""] if examples else []
    parts += [f"Usage: `{command.usage}`", "", f":::{{program}} nirvana-deploy {name}", ":::", ""]
    for title, options in command.groups():
        parts += [f"**{escaped(title)}**", ""]
        for option in options:
            parts += [f":::{{option}} {signature(option, command.context)}", described(option), ":::", ""]
    parts += [f"{escaped(command.command.epilog)}\n"] if command.command.epilog else []
    return "\n".join(parts)


def signature(option: click.Option, context: click.Context) -> str:
    """``--sparsity FLOAT``, or ``--baseline, --no-baseline``."""
    takes = "" if option.is_flag else f" {option.make_metavar(context).removesuffix(' RANGE')}"
    return ", ".join(f"{flag}{takes}" for flag in (*option.opts, *option.secondary_opts))


def described(option: click.Option) -> str:
    """Help, what is allowed beyond what the signature says, and the default."""
    computed = _COMPUTED.match(option.help or "")
    said, default = (computed["said"], computed["default"]) if computed else (option.help or "", "")
    facts = [*allowed(option.type)]
    facts += ["may be repeated"] if option.multiple and not isinstance(option.type, Listed) else []
    if option.required:
        facts.append("required")
    elif option.show_default:
        facts.append(f"default: `{_shown(option)}`")
    elif default:
        facts.append(f"default: {escaped(default)}")
    told = "; ".join(facts)
    return escaped(said) + (f"\n\n{told[:1].upper()}{told[1:]}." if told else "")


def _shown(option: click.Option) -> Any:
    if option.secondary_opts:
        return (option.opts if option.default else option.secondary_opts)[0]
    return option.show_default if isinstance(option.show_default, str) else option.default


def allowed(kind: click.ParamType[Any]) -> list[str]:
    """What a type takes, beyond its name and its choices."""
    if isinstance(kind, Listed):
        return [*allowed(kind.of), "several separated by commas, or repeated"]
    if isinstance(kind, click.IntRange | click.FloatRange) and kind.min is not None:
        return [f"at least {kind.min}"]
    return ["a size with its unit: 300MB (decimal) or 512MiB (binary)"] if isinstance(kind, Bytes) else []


class Commands(Generated):
    """The pages of the commands that its argument names."""

    def made(self, *arguments: str) -> str:
        """One section a command."""
        return "\n".join(page_of(name) for argument in arguments for name in argument.split())


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
