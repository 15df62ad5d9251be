"""Ways to cut: what a search tries beside the job's own options, as ``--try "saliency=nirvana ridge=1"``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.recipe import Field
from nirvana_deploy.base.registry import nearest_names
from nirvana_deploy.quantize.schemes import onnx_schemes

_EXAMPLE = 'For example --try "saliency=nirvana allocation=global", or --try recover=10m'


@dataclass(frozen=True)
class Way:
    """A few options that a job is given in place of its own."""

    name: str = ""
    """For people, folders and records: "nirvana-global", "recover10m"; empty for the job as it is."""
    options: tuple[tuple[str, Any], ...] = ()
    """Name and value, by name."""


OWN = Way()
"""The job's own options."""


def ways_of(texts: Sequence[str], fields: Iterable[Field]) -> tuple[Way, ...]:
    """The job's own way, then those of ``texts``, which may set ``fields``.

    Raises NirvanaError for a text that sets nothing, an unknown option or a value that is not allowed, and
    for two of the same name.
    """
    known = {_key(name): field for field in fields for name in (field.name, field.option.flag or field.name)}
    ways = [OWN, *(_way(text, known) for text in texts)]
    for number, way in enumerate(ways):
        if way.name in {other.name for other in ways[:number]}:
            raise NirvanaError(
                f"--try {texts[number - 1]!r} is called {way.name!r}, as another one is.",
                hint="Each sets other values, and files of different names.",
            )
    return tuple(ways)


def _way(text: str, known: Mapping[str, Field]) -> Way:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise NirvanaError(f"--try {text!r} cannot be read: {error}.", hint=_EXAMPLE) from None
    options = dict(_set(word, text, known) for word in words)
    if not options:
        raise NirvanaError("--try is empty; it takes OPTION=VALUE, or several.", hint=_EXAMPLE)
    names = [_said(name, value) for name, value in options.items()]
    return Way("-".join(names), tuple(sorted(options.items())))


def _set(word: str, text: str, known: Mapping[str, Field]) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not (key and equals and value):
        raise NirvanaError(f"--try {text!r}: {word!r} sets nothing; write OPTION=VALUE.", hint=_EXAMPLE)
    field = known.get(_key(key))
    if field is None:
        names = sorted({field.name.replace("_", "-") for field in known.values()})
        close = nearest_names(key.lstrip("-"), names, at_most=1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        raise NirvanaError(
            f"--try {text!r}: a search cannot try {key!r}.{guess} It tries {', '.join(names)}.", hint=_EXAMPLE
        )
    return field.name, field.check(value, text=True)


def _key(name: str) -> str:
    return name.partition("/")[0].lstrip("-").replace("-", "_")


def _said(name: str, value: Any) -> str:
    """A word that stands for itself, else the option's name before the value: nirvana, ridge1, recover10m.

    A scheme's does not: "s0.2-w4" is a precision.
    """
    word = PurePath(value).name if isinstance(value, str) else format(value, "g") if value else str(value)
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-.")
    alone = isinstance(value, str) and slug[:1].isalpha() and slug not in onnx_schemes()
    return slug if alone else f"{name.replace('_', '-')}{slug}"
