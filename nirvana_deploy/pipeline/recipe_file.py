"""recipe.toml: a job as a file that people read, keep and change."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import tomli_w

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_toml
from nirvana_deploy.base.recipe import Field, fields_of, make
from nirvana_deploy.base.registry import nearest_names
from nirvana_deploy.pipeline.job import SECTIONS, Job, as_json

SCHEMA = 1
_WIDTH = 100
_HEAD = """\
# A recipe of nirvana-deploy: everything that decides the result.
# Do it (again): nirvana-deploy prune-export --recipe FILE --out DIR
"""


def recipe_toml(job: Job) -> str:
    """The text of recipe.toml: each option under its help; one without a value is a comment."""
    plain = as_json(job)
    lines = [_HEAD, f"schema = {SCHEMA}", _line("model", job.model)]
    for section, kind in SECTIONS.items():
        lines.append(f"\n[{section}]")
        for field in fields_of(kind):
            lines += _entry(field, plain[section][field.name])
    return "\n".join(lines) + "\n"


def write_recipe(job: Job, path: Path) -> None:
    """Write recipe.toml, whole or not at all."""
    write_bytes(path, recipe_toml(job).encode())


def read_recipe(path: Path) -> Job:
    """The job of a recipe.toml.

    Raises NirvanaError for a file that is missing or not TOML, and for a key that is unknown, missing, of a
    wrong type or not allowed: with the section, the key, the value and what is allowed.
    """
    data = read_toml(path, hint=_HOW_TO_MAKE)
    if data.pop("schema", None) != SCHEMA:
        raise NirvanaError(f"{path} says no schema that this version reads: it must say schema = {SCHEMA}.")
    model = data.pop("model", None)
    if not isinstance(model, str) or not model:
        raise NirvanaError(
            f"{path}: model = {model!r} is not allowed; it takes an alias, a hub id or a path."
        )
    for key, value in data.items():
        if key not in SECTIONS:
            close = nearest_names(key, list(SECTIONS))
            guess = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
            known = ", ".join(SECTIONS)
            raise NirvanaError(f"{path}: unknown section or key {key!r}.{guess} Sections: {known}.")
        if not isinstance(value, dict):
            raise NirvanaError(f"{path}: {key} = {value!r} is not allowed; it takes a section, [{key}].")
    return Job(
        model=model,
        **{
            section: make(kind, data.get(section, {}), where=f"{path} [{section}]")
            for section, kind in SECTIONS.items()
        },
    )


_HOW_TO_MAKE = "nirvana-deploy recipe MODEL --sparsity 0.4 > my.toml"


def _entry(field: Field, value: Any) -> list[str]:
    """The lines of one option."""
    comment = textwrap.wrap(field.option.help, _WIDTH, initial_indent="# ", subsequent_indent="# ")
    return [*comment, f"# {field.name} =" if value is None else _line(field.name, value)]


def _line(name: str, value: Any) -> str:
    return tomli_w.dumps({name: value}, multiline_strings=False).strip()
