"""Files of this tool read back: whole, of the kind that was written, or refused in a sentence.

What was written may since have been cut short, edited, or replaced by what is no file at all. The sentence
names the file, the key, the value there and what is allowed. Nothing here waits, as opening a pipe would.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, is_typeddict, overload

from nirvana_deploy.base.errors import LaterVersionError, NirvanaError, upgrade

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kind = TypeVar("Kind")
_MOST_BYTES = 1 << 28
"""No record is near it; a file that claims more is not read into memory."""
_SHOWN = 60
HALF_A_PAIR = re.compile(r"[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can say and UTF-8 cannot."""


def read_bytes(path: Path, *, hint: str | None = None) -> bytes:
    """The content of a file; raises NirvanaError for one that is missing, no file, unreadable or huge."""
    with _opened(path, hint) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > _MOST_BYTES:
            raise NirvanaError(f"{path} is not read: it has {size:,} bytes, no record is so long.", hint=hint)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(size + 1)  # a buffer of what is asked for is made at once


def read_text(path: Path, *, hint: str | None = None) -> str:
    """A user's text in UTF-8, of any length, as ``open`` reads it but for a mark of the byte order in front.

    Raises NirvanaError for a file that is missing, no file, unreadable, not UTF-8 or larger than memory.
    """
    with _opened(path, hint) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
        try:
            with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
                return text.read()
        except UnicodeDecodeError as error:
            raise NirvanaError(
                f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}.",
                hint=f"Convert it: iconv -f LATIN1 -t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}",
            ) from None
        except MemoryError:
            size = f"{os.fstat(descriptor).st_size:,} bytes"
            raise NirvanaError(f"{path} does not fit into memory: it has {size}.", hint=hint) from None


def require_file(path: Path, *, hint: str | None = None) -> None:
    """Raise NirvanaError unless ``path`` is a file that can be read."""
    with _opened(path, hint):
        pass


@overload
def read_json(path: Path, *, hint: str | None = None) -> Any: ...
@overload
def read_json(
    path: Path, kind: type[Kind], *, schema: int | None = None, hint: str | None = None
) -> Kind: ...
def read_json(path: Path, kind: Any = Any, *, schema: int | None = None, hint: str | None = None) -> Any:
    """The value of a JSON file, as ``kind`` (a dataclass, a TypedDict, ``list[int]``, ...).

    Raises NirvanaError for a file that cannot be read or is not JSON, for a key that stands twice, a number
    that is none, a ``schema`` other than this one, and a value of another type.
    """
    value = parse_json(read_bytes(path, hint=hint), str(path), hint=hint)
    if schema is not None:
        _require_schema(value, schema, str(path), hint)
    return typed(value, kind, str(path), hint=hint)


def read_toml(path: Path, *, hint: str | None = None) -> dict[str, Any]:
    """The tables of a TOML file; raises NirvanaError for a file that cannot be read or is not TOML."""
    data = read_bytes(path, hint=hint)
    with _parsing(str(path), "TOML", hint):
        return tomllib.loads(data.decode())


def read_tensors(path: Path, *, hint: str | None = None) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors of a safetensors file by name, and its metadata; raises NirvanaError for any other file."""
    from safetensors import SafetensorError, safe_open

    require_file(path, hint=hint)
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # a dtype that numpy has not
        raise NirvanaError(f"{path} is no safetensors file of this tool: {error}.", hint=hint) from error


def parse_json(data: bytes | str, where: str, *, hint: str | None = None) -> Any:
    """The value of a JSON text, which stands at ``where``; raises NirvanaError as :func:`read_json` does."""
    with _parsing(where, "JSON", hint):
        text = data if isinstance(data, str) else data.decode()
        return json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_number, parse_float=_finite)


def typed(value: Any, kind: type[Kind], where: str, *, hint: str | None = None) -> Kind:
    """``value``, which stands at ``where``, as ``kind``; raises NirvanaError where it is something else.

    Types are strict: true is no number, 1.0 no whole one. A TypedDict is given back with the keys that it
    does not name, too.
    """
    import msgspec

    try:
        found = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise NirvanaError(f"{where}: {_said(error, value, kind)}.", hint=hint) from None
    except RecursionError:
        raise NirvanaError(f"{where}: it is nested too deeply.", hint=hint) from None
    except UnicodeEncodeError as error:  # half of a surrogate pair, where msgspec tries to read a number
        half = error.object[error.start : error.end]
        raise NirvanaError(f"{where}: {half!r} in it is no whole character.", hint=hint) from None
    return value if is_typeddict(kind) else found


def open_flags(*names: str) -> int:
    """The flags of ``os.open`` of these names; Windows lacks some, and has O_BINARY to leave bytes alone."""
    flags = 0
    for name in (*names, "O_BINARY"):
        flags |= getattr(os, name, 0)
    return flags


@contextmanager
def _opened(path: Path, hint: str | None) -> Iterator[int]:
    """A descriptor of a regular file."""
    try:
        descriptor = os.open(path, open_flags("O_RDONLY", "O_NONBLOCK"))
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
                raise NirvanaError(f"{path} cannot be read: it is {what}, not a file.", hint=hint)
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        if path.is_symlink():
            raise NirvanaError(
                f"{path} cannot be read: it is a link to {path.readlink()}, which does not exist.",
                hint=hint,
            ) from None
        raise NirvanaError(f"{path} does not exist.", hint=hint) from None
    except (OSError, ValueError) as error:  # a name with a zero byte
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise NirvanaError(f"{path} cannot be read: {reason[:1].lower()}{reason[1:]}.", hint=hint) from error


@contextmanager
def _parsing(where: str, language: str, hint: str | None) -> Iterator[None]:
    """Turn what a parser says of the text at ``where`` into a NirvanaError."""
    try:
        yield
    except RecursionError:
        raise NirvanaError(f"{where} is not read: it is nested too deeply.", hint=hint) from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise NirvanaError(
            f"{where} is not valid {language}: byte {byte:#04x} at offset {error.start} is not UTF-8.",
            hint=hint,
        ) from None
    except ValueError as error:
        said = str(error).removesuffix(".")
        said = "it holds a number of thousands of digits" if "int_max_str_digits" in said else said
        raise NirvanaError(f"{where} is not valid {language}: {said}.", hint=hint) from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {_shown(twice)} stands twice in one object")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits:.{_SHOWN}} is too large")
    return number


def _require_schema(value: Any, schema: int, where: str, hint: str | None) -> None:
    found = value.get("schema") if isinstance(value, dict) else None
    if type(found) is not int or found != schema:
        error = LaterVersionError if type(found) is int and found > schema else NirvanaError
        raise error(
            f"{where} has schema {found!r:.{_SHOWN}}; this version reads schema {schema}.",
            hint=hint or upgrade(),
        )


_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at `(?:key` in `)?\$(?P<place>.*)`)?", re.DOTALL)
_STEP = re.compile(r"\.(?P<field>[^.\[]+)|\[(?P<index>\d+)\]|(?P<any>\[\.\.\.\])")
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _said(error: Exception, value: Any, kind: Any) -> str:
    """What msgspec found, with the key path, the value there and what is allowed in a user's words."""
    found = _MESSAGE.fullmatch(str(error))
    what, place = (found["what"], found["place"] or "") if found else (str(error), "")
    path, there = _walk(deepcopy(value), kind, place)
    if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
        return f"{path or 'it'} has no {missing[1]!r}"
    if other := re.fullmatch(r"Expected `([^`]*)`, got `[^`]*`", what):
        allowed = " or ".join(_TYPES.get(one, one) for one in other[1].split(" | "))
        return f"{path or 'it'} is {_shown(there)}, not {allowed}"
    what = re.sub("`([^`]*)`", lambda name: _TYPES.get(name[1], name[1]), what)
    return f"{path or 'it'} is {_shown(there)}: {what[:1].lower()}{what[1:]}"


def _walk(value: Any, kind: Any, place: str) -> tuple[str, Any]:
    """The key path and the value that msgspec's ``place`` means; ``value`` is changed on the way.

    It says ``[...]`` for any key of an object: there each entry is tried alone.
    """
    import msgspec

    path, here = "", value
    for step in _STEP.finditer(place):
        if step["any"]:
            for key, entry in list(here.items()):
                here.clear()
                here[key] = entry
                with suppress(msgspec.ValidationError):
                    msgspec.convert(value, kind)
                    continue
                break
            path, here = f"{path}.{key}", entry
        elif step["field"]:
            path, here = f"{path}.{step['field']}", here[step["field"]]
        else:
            path, here = f"{path}[{step['index']}]", here[int(step["index"])]
    return path.removeprefix("."), here


def _shown(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    if isinstance(value, Mapping | list | tuple):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
