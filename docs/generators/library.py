"""``:::{library}``: the public functions, and the types that they take and return.

``:::{recipe-keys}`` and ``:::{families}`` are tables of the same sources. The keywords of a job stand with
recipe.toml, so the signature of ``prune_export`` leaves them out.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from sphinx.application import Sphinx

import nirvana_deploy
from nirvana_deploy.base.recipe import Field, fields_of
from nirvana_deploy.model.families import FAMILIES
from nirvana_deploy.pipeline.job import SECTIONS, all_fields

from .markdown import Generated, escaped, table

_OF_A_JOB = frozenset(field.name for field in all_fields())
_ADDRESS = re.compile(r"<[\w.]*SilentProgress object[^>]*>")
_LIST_OF_OPTIONS = "which ``sparsity`` is required:"
"""The end of a docstring that goes on with every option."""


def public() -> dict[str, Any]:
    """What ``nirvana_deploy`` shows, by name."""
    return {name: getattr(nirvana_deploy, name) for name in nirvana_deploy.__all__}


def companions() -> dict[str, Any]:
    """Types of this package that the public functions take or return, by the name to import, sorted."""
    found: dict[str, Any] = {}
    for function in filter(inspect.isfunction, public().values()):
        for hint in _hints(function):
            for kind in (hint, *typing.get_args(hint)):
                if inspect.isclass(kind) and kind.__module__.startswith("nirvana_deploy."):
                    found[f"{kind.__module__}.{kind.__name__}"] = kind
    return {
        place: kind
        for place, kind in sorted(found.items())
        if kind not in public().values() and not getattr(kind, "_is_protocol", False)
    }


def _hints(function: Any) -> Iterator[Any]:
    """The types in a signature, but those that are imported for type checkers alone."""
    for hint in inspect.unwrap(function).__annotations__.values():
        with suppress(NameError):
            yield eval(hint, vars(sys.modules[function.__module__])) if isinstance(hint, str) else hint


def _documented(place: str, kind: Any) -> str:
    if inspect.isfunction(kind):
        return f"```{{eval-rst}}\n.. autofunction:: {place}\n```"
    if issubclass(kind, Exception):
        return f"```{{eval-rst}}\n.. autoexception:: {place}\n   :no-index-entry:\n```"
    if _is_recipe(kind):
        return f"### {kind.__name__}\n\n`from {kind.__module__} import {kind.__name__}`\n\n{_fields(kind)}"
    return f"```{{eval-rst}}\n.. autoclass:: {place}()\n   :members:\n   :undoc-members:\n```"


def _is_recipe(kind: Any) -> bool:
    return bool(kind.__module__.endswith(".recipe"))


def _fields(kind: Any) -> str:
    rows = [(f"`{one.name}`", *_facts(one)) for one in fields_of(kind)]
    said = (inspect.getdoc(kind) or "").partition("\n")[0]
    return f"{escaped(said)}\n\n" + table(["Field", "Default", "What it is"], rows, numbers=False)


def _facts(field: Field) -> tuple[str, str]:
    default = "required" if field.required else f"`{_plain(field.default)}`"
    return default, f"{escaped(field.option.help)} Takes {escaped(field.allowed)}."


def _plain(value: Any) -> str:
    return "()" if value == () else str(value)


class Library(Generated):
    """All of ``nirvana_deploy.__all__``."""

    def made(self, *arguments: str) -> str:
        """Functions, types, errors, then the types beside them."""
        names = public()
        errors = {
            name for name, kind in names.items() if inspect.isclass(kind) and issubclass(kind, Exception)
        }
        functions = {name for name, kind in names.items() if inspect.isfunction(kind)}
        parts = ["## Functions", *self._all(sorted(functions))]
        parts += ["## Types", *self._all(sorted(names.keys() - functions - errors))]
        parts += ["## Errors", *self._all(sorted(errors))]
        parts += ["## Taken and returned", *(_documented(*one) for one in companions().items())]
        return "\n\n".join(parts)

    def _all(self, names: list[str]) -> list[str]:
        return [_documented(f"nirvana_deploy.{name}", public()[name]) for name in names]


class Families(Generated):
    """The families of models, as ``nirvana-deploy models`` lists them."""

    def made(self, *arguments: str) -> str:
        """One row a family."""
        rows = [
            (
                f"`{name}`",
                family.architecture,
                ", ".join(family.units),
                "yes" if family.genai_type else "no",
                family.gguf.name if family.gguf else "no",
                f"{family.tried_on} weights",
            )
            for name, family in FAMILIES.items()
        ]
        headers = ["Family", "Architecture", "Removes", "onnxruntime-genai", "llama.cpp", "Tried on"]
        return table(headers, rows, numbers=False)


class RecipeKeys(Generated):
    """The keys of recipe.toml, by section; each is a keyword of ``prune_export`` too."""

    def made(self, *arguments: str) -> str:
        """A table a section."""
        return "\n\n".join(f"## \\[{section}\\]\n\n{_fields(kind)}" for section, kind in SECTIONS.items())


def _short_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """``**options`` in place of every option of a job, and names in place of addresses."""
    if obj is nirvana_deploy.prune_export:
        own = inspect.signature(obj)
        kept = [one for one in own.parameters.values() if one.name not in _OF_A_JOB]
        kept.append(inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD))
        bare = [one.replace(annotation=inspect.Parameter.empty) for one in kept]
        signature = str(inspect.Signature(bare))
    return (None if signature is None else _ADDRESS.sub("SILENT", signature)), returned


def _short_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Leave the list of options out: it is the reference of recipe.toml."""
    for number, line in enumerate(lines):
        if line.strip() == _LIST_OF_OPTIONS:
            lines[number:] = [line.replace("required:", "required: see recipe.toml.")]
            return


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives, and what shortens the signature of ``prune_export``."""
    app.add_directive("families", Families)
    app.add_directive("library", Library)
    app.add_directive("recipe-keys", RecipeKeys)
    app.connect("autodoc-process-signature", _short_signature)
    app.connect("autodoc-process-docstring", _short_docstring)
    return {"parallel_read_safe": True}
