"""Command-line options, made from the fields of recipes, where defaults, help texts and checks live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from nirvana_deploy.base.recipe import Field, fields_of, share_of
from nirvana_deploy.base.units import bytes_of, typed_bytes

from .arguments import suggesting

Command = TypeVar("Command", bound=Callable[..., Any])
Kind = TypeVar("Kind")


class ShownOption(click.Option):
    """An option whose default, if it is told in words, stands in its help as any other."""

    def get_help_extra(self, ctx: click.Context) -> click.types.OptionHelpExtra:
        """What stands in brackets."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra


class AtLeast(click.IntRange):
    """A whole number."""

    name = "integer"


json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")
force_option = click.option("--force", is_flag=True, help="Overwrite an existing target.")


class NumberOrWord(click.ParamType[Any]):
    """A number, or one of a few words."""

    def __init__(self, words: tuple[str, ...], *, whole: bool = False) -> None:
        self.words = words
        self._read = int if whole else float
        self.name = "|".join(("integer" if whole else "float", *words))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse what the user typed."""
        if value in self.words:
            return value
        try:
            return self._read(value)
        except ValueError:
            words = " or ".join(repr(word) for word in self.words)
            number = "a whole number" if self._read is int else "a number"
            self.fail(f"{value!r} is neither {number} nor {words}.", param, ctx)


class Share(click.ParamType[Any]):
    """A share of a whole: 0.4 or 40%."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse what the user typed."""
        try:
            return share_of(str(value))
        except ValueError:
            self.fail(f"{value!r} is no share; 0.4 and 40% are.", param, ctx)


class Bytes(click.ParamType[Any]):
    """A size with its unit: 300MB is decimal, as sizes on pages are, and 300MiB binary."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse what the user typed."""
        if isinstance(value, int):  # a default
            return value
        try:
            return bytes_of(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Listed(click.ParamType[Any]):
    """Several of one type, separated by commas."""

    def __init__(self, of: click.ParamType[Any]) -> None:
        self.of = of
        self.name = of.name

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        """Its choices, if any."""
        return self.of.get_metavar(param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete the last one."""
        before, comma, last = incomplete.rpartition(",")
        found = self.of.shell_complete(ctx, param, last)
        return [CompletionItem(f"{before}{comma}{item.value}", type=item.type) for item in found]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse what the user typed."""
        if not isinstance(value, str):
            return value
        return tuple(self.of.convert(word.strip(), param, ctx) for word in value.split(","))


def recipe_options(
    *kinds: type[Any], required: bool = True, without: Sequence[str] = ()
) -> Callable[[Command], Command]:
    """Give a command the options of some recipes, in order.

    ``required`` False leaves it to the recipe whether an option without default is missing.
    """
    fields = [
        field
        for kind in kinds
        for field in fields_of(kind)
        if field.option.command_line and field.name not in without
    ]

    def decorate(command: Command) -> Command:
        for field in reversed(fields):
            command = _option(field, required=required)(command)
        return command

    return decorate


def taken(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """Make the recipe of ``kind`` from a command's ``values``; its options leave them."""
    names = [field.name for field in fields_of(kind) if field.name in values]
    return kind(**{name: values.pop(name) for name in names})


def typed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the ``values`` that the user typed."""
    source = click.get_current_context().get_parameter_source
    return {
        name: value
        for name, value in values.items()
        if source(name) is click.core.ParameterSource.COMMANDLINE
    }


def _option(field: Field, *, required: bool) -> Callable[[Command], Command]:
    option = field.option
    flag = option.flag or f"--{field.name.replace('_', '-')}"
    shown: dict[str, Any] = {"cls": ShownOption, **_help_of(field)}
    if option.suggests is not None:
        shown["shell_complete"] = suggesting(option.suggests)
    if field.type is bool:
        if "/" in flag:
            return click.option(flag, field.name, default=field.default, **({"show_default": True} | shown))
        return click.option(flag, field.name, is_flag=True, **shown)
    if option.metavar is not None:
        shown["metavar"] = option.metavar
    if get_origin(field.type) is tuple and field.choices is None:  # a path may hold a comma
        return click.option(flag, field.name, multiple=True, type=_type(field), **shown)
    if get_origin(field.type) is tuple:
        return click.option(
            flag, field.name, multiple=True, type=Listed(_type(field)), callback=_flat, **shown
        )
    if field.required:
        return click.option(flag, field.name, type=_type(field), required=required, **shown)
    return click.option(
        flag,
        field.name,
        type=_type(field),
        default=field.default,
        **({"show_default": field.default is not None} | shown),
    )


def _help_of(field: Field) -> dict[str, Any]:
    """Help, and a default that is found out later, which the help text has in brackets at its end."""
    text, bracket, default = field.option.help.rpartition(" [")
    if not bracket or not default.endswith("]"):
        typed = field.option.size and isinstance(field.default, int)
        return {"help": field.option.help} | ({"show_default": typed_bytes(field.default)} if typed else {})
    return {"help": text, "show_default": default.removesuffix("]")}


def _flat(ctx: click.Context, param: click.Parameter, value: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """All of what an option was given, whether repeated or separated by commas."""
    return tuple(one for several in value for one in several)


def _item_types(field: Field) -> tuple[Any, ...]:
    """The alternatives of its type; of a list, of what is in it."""
    return get_args(field.type)[:1] if get_origin(field.type) is tuple else field.types


def _type(field: Field) -> click.ParamType[Any]:
    option, types = field.option, _item_types(field)
    if option.share:
        return Share()
    if field.choices is not None:
        return click.Choice(field.choices)
    if option.size:
        return Bytes()
    words = tuple(word for part in types if get_origin(part) is Literal for word in get_args(part))
    if words:
        return NumberOrWord(words, whole=float not in types)
    if option.existing_folder:
        return click.Path(exists=True, file_okay=False, path_type=Path)
    if Path in types:
        return click.Path(path_type=Path)
    if int in types:
        return click.INT if option.minimum is None else AtLeast(min=int(option.minimum))
    return click.FLOAT if float in types else click.STRING
