"""Recipes: frozen dataclasses whose fields are the only home of an option.

A field ``seq_len: Annotated[int, Option("Tokens per window.", minimum=2)] = 128`` says its name, type,
default, help text and what is allowed; the command line, the library's keywords and recipe.toml are made
from it.
A recipe checks itself: whoever holds one holds allowed values.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.registry import nearest_names

Kind = TypeVar("Kind")
_MOST, _MOST_BYTES = 2**31 - 1, 2**63 - 1
"""The largest count, and size, that the libraries below take."""


@dataclass(frozen=True)
class Option:
    """What a field says beside its name, type and default."""

    help: str
    minimum: int | float | None = None
    choices: Iterable[str] | Callable[[], Iterable[str]] | None = None
    """The names that are allowed, in order; a table stands for its keys, a function for what it returns."""
    flag: str | None = None
    """Its spelling on the command line where that is not the field's name: "--engine"."""
    command_line: bool = True
    """Whether it is an option there at all, or a keyword and a key of recipe.toml alone."""
    resumable: bool = False
    """Whether a resumed run may change it: it adds stages, and of those finished changes timings alone."""
    metavar: str | None = None
    existing_folder: bool = False
    """A path that must be a folder."""
    size: bool = False
    """A number of bytes, on the command line with its unit: 512MB, 2GiB."""
    share: bool = False
    """A share of a whole, on the command line also as 40%."""
    suggests: Callable[[], Iterable[str]] | None = None
    """Names that a shell may complete, among other texts that are allowed."""
    takes: str | None = None
    """What is allowed, where the type alone does not say it for people."""


def share_of(text: str) -> float:
    """The number that "0.4" or "40%" stands for; raises ValueError for neither."""
    number = float(text.strip().removesuffix("%"))
    if not math.isfinite(number):
        raise ValueError(text)
    return number / 100 if text.strip().endswith("%") else number


@dataclass(frozen=True)
class Field:
    """One option of a recipe, ready to be shown and checked."""

    name: str
    type: Any
    """The type without its annotation."""
    default: Any
    """``dataclasses.MISSING`` for a required one."""
    option: Option

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING

    @property
    def parameter(self) -> inspect.Parameter:
        """The keyword that it is, for help() and editors."""
        default = inspect.Parameter.empty if self.required else self.default
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=self.type
        )

    @property
    def types(self) -> tuple[Any, ...]:
        """The alternatives of its type, None left out."""
        parts = get_args(self.type) if get_origin(self.type) in (Union, UnionType) else (self.type,)
        return tuple(part for part in parts if part is not type(None))

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The names that are allowed now; None for a field of another kind."""
        choices = self.option.choices
        return None if choices is None else tuple(choices() if callable(choices) else choices)

    @property
    def allowed(self) -> str:
        """What is allowed, for people."""
        if self.option.takes is not None:
            return self.option.takes
        if self.choices is not None:
            names = " or ".join(repr(name) for name in self.choices)
            return f"a list of {names}" if get_origin(self.type) is tuple else names
        words: dict[Any, str] = {
            tuple[Path, ...]: "a path or a list of paths",
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "a text",
            Path: "a path",
        }
        said = [
            " or ".join(repr(word) for word in get_args(part))
            if get_origin(part) is Literal
            else words.get(part, "a list of texts")
            for part in self.types
        ]
        least = "" if self.option.minimum is None else f" of at least {self.option.minimum}"
        return " or ".join(said) + least

    def check(self, value: Any, *, text: bool = False) -> Any:
        """``value`` as the field's type; raises NirvanaError with the key, the value and what is allowed.

        ``text``: it was typed, and "0.5" may be a number.
        """
        import msgspec

        if value is None and self.default is None:
            return None
        if get_origin(self.type) is tuple and isinstance(value, (str, Path)):
            value = (value,)  # a list of one
        try:
            found = msgspec.convert(value, self.type, strict=not text, dec_hook=_as_path)
        except msgspec.ValidationError:
            raise self._refused(value) from None
        option = self.option
        numbers = isinstance(found, (int, float)) and not isinstance(found, bool)
        if option.minimum is not None and numbers and not found >= option.minimum:
            raise self._refused(value)
        most = _MOST_BYTES if option.size else _MOST
        if isinstance(found, int) and found > most:
            raise NirvanaError(f"{self.name} = {found} is not allowed; it takes at most {most}.")
        named = found if isinstance(found, tuple) else (found,)
        if self.choices is not None and found is not None and any(name not in self.choices for name in named):
            raise self._refused(value)
        return found

    def _refused(self, value: Any) -> NirvanaError:
        guess = ""
        if self.choices is not None:
            named = list(value) if isinstance(value, list | tuple) else [value]
            unknown = [name for name in named if name not in self.choices]
            close = nearest_names(str(unknown[0]), list(self.choices), at_most=1) if unknown else []
            guess = f" Did you mean {close[0]!r}?" if close else ""
        return NirvanaError(f"{self.name} = {value!r} is not allowed; it takes {self.allowed}.{guess}")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def recipe(kind: type[Kind]) -> type[Kind]:
    """Make a class of annotated fields a recipe: a frozen dataclass that checks its values."""

    def check(self: Any) -> None:
        for field in fields_of(kind):
            object.__setattr__(self, field.name, field.check(getattr(self, field.name)))

    kind.__post_init__ = check  # type: ignore[attr-defined]
    made = dataclass(frozen=True, kw_only=True)(kind)
    fields = list(fields_of(made))
    made.__doc__ = "\n".join([f"{made.__doc__}\n", *(f"{f.name}: {f.option.help}" for f in fields)])
    made.__signature__ = inspect.Signature([field.parameter for field in fields])  # type: ignore[attr-defined]
    return made


def fields_of(kind: type[Any]) -> Iterator[Field]:
    """The options of a recipe class, in order."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if get_origin(hint) is not Annotated:
            raise TypeError(f"{kind.__name__}.{field.name} says no Option")
        base, option = get_args(hint)
        yield Field(field.name, base, field.default, option)


def names_of(kind: type[Any]) -> tuple[str, ...]:
    """The names of the options of a recipe class, in order."""
    return tuple(field.name for field in fields_of(kind))


def make(kind: type[Kind], values: Mapping[str, Any], *, where: str) -> Kind:
    """A recipe from ``values`` by name; ``where`` ("recipe.toml [pruning]") says where they stand.

    Raises NirvanaError for an unknown key, a missing one, a wrong type or a value that is not allowed.
    """
    fields = {field.name: field for field in fields_of(kind)}
    for key in values:
        if key not in fields:
            close = nearest_names(key, list(fields))
            guess = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
            raise NirvanaError(f"{where}: unknown key {key!r}.{guess} Known: {', '.join(fields)}.")
    for name, field in fields.items():
        if field.required and name not in values:
            raise NirvanaError(f"{where}: {name!r} is missing; it takes {field.allowed}.")
    try:
        return kind(**values)
    except NirvanaError as error:
        raise NirvanaError(f"{where}: {error.message}", hint=error.hint) from None


def _as_path(kind: type[Any], value: Any) -> Any:
    """Paths are texts in recipe.toml."""
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    raise NotImplementedError(kind)
