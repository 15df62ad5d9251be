"""Everything that decides what ``prune_export`` makes of a model: one section per room.

Field names are unique over all sections, so that a job is also a flat set of keywords.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.recipe import Field, fields_of, make
from nirvana_deploy.base.registry import nearest_names
from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.engine.recipe import Engines
from nirvana_deploy.export.recipe import Export
from nirvana_deploy.measure.recipe import Measurement
from nirvana_deploy.pipeline.presets import with_preset
from nirvana_deploy.prune.recipe import Pruning
from nirvana_deploy.quantize.recipe import Schemes
from nirvana_deploy.recover.recipe import Recovery


@dataclass(frozen=True)
class Job:
    """The model and the recipe of every room."""

    model: str
    """An alias, a hub id, a folder or a .gguf file."""
    pruning: Pruning
    calibration: Calibration
    recovery: Recovery
    export: Export
    quantization: Schemes
    engine: Engines
    measurement: Measurement

    def options(self, sections: Iterable[str] | None = None) -> dict[str, Any]:
        """The options of some sections [all], flat, by name."""
        return {
            field.name: getattr(getattr(self, section), field.name)
            for section in sections or SECTIONS
            for field in fields_of(SECTIONS[section])
        }


SECTIONS: dict[str, type[Any]] = {
    "pruning": Pruning,
    "calibration": Calibration,
    "recovery": Recovery,
    "export": Export,
    "quantization": Schemes,
    "engine": Engines,
    "measurement": Measurement,
}
"""Section of recipe.toml, and attribute of :class:`Job` -> its recipe."""


def all_fields() -> Iterator[Field]:
    """Every option of a job."""
    for kind in SECTIONS.values():
        yield from fields_of(kind)


def job_of(model: str, options: Mapping[str, Any], *, base: Job | None = None) -> Job:
    """The job of flat ``options``.

    What they leave out is as the preset that they name says, else as in ``base``, else the default.
    Raises NirvanaError for an option that is unknown, missing, of a wrong type or not allowed.
    """
    names = {field.name for field in all_fields()}
    for key in options:
        if key not in names:
            close = nearest_names(key, sorted(names))
            guess = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
            raise NirvanaError(f"Unknown option {key!r}.{guess} Known: {', '.join(sorted(names))}.")
    defaults = {field.name: field.default for field in all_fields() if not field.required}
    given = {**(base.options() if base else {}), **with_preset(options, defaults)}
    sections = {
        section: make(
            kind,
            {field.name: given[field.name] for field in fields_of(kind) if field.name in given},
            where="Options",
        )
        for section, kind in SECTIONS.items()
    }
    return Job(model=model, **sections)


def as_json(job: Job) -> dict[str, Any]:
    """The job as JSON: the model, and a section per room."""
    sections = {name: job.options([name]) for name in SECTIONS}
    return {"model": job.model} | {
        name: {key: plain(value) for key, value in options.items()} for name, options in sections.items()
    }


def plain(value: Any) -> Any:
    """The value of an option as JSON has it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def spelled_out(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function of ``**options`` with every option spelled out, for help() and editors."""
    own = inspect.signature(function)
    fixed = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.required else field.default,
            annotation=field.type,
        )
        for field in all_fields()
    ]
    return own.replace(parameters=[fixed[0], *options, *fixed[1:]])
