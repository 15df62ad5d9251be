"""Everything that decides what ``prune_export`` makes of a model: one section per room.

Field names are unique over all sections, so that a job is also a flat set of keywords.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Required, TypedDict

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.recipe import Field, fields_of, make
from nirvana_deploy.base.registry import nearest_names
from nirvana_deploy.base.shown.html import html_table
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

    def __repr__(self) -> str:
        """The model, and what is not as it would be anyway."""
        usual = {field.name: field.default for field in all_fields()}
        chosen = (f"{name}={value!r}" for name, value in self.options().items() if value != usual[name])
        return f"Job({', '.join([repr(self.model), *chosen])})"

    def _repr_html_(self) -> str:
        """Every option with its value, for a notebook."""
        rows = [
            (section, name, plain(value))
            for section in SECTIONS
            for name, value in self.options([section]).items()
        ]
        return html_table(["Section", "Option", "Value"], rows, title=self.model)

    def options(self, sections: Iterable[str] | None = None) -> dict[str, Any]:
        """The options of some sections [all], flat, by name."""
        return {
            field.name: getattr(getattr(self, section), field.name)
            for section in sections or SECTIONS
            for field in fields_of(SECTIONS[section])
        }


class JobOptions(TypedDict, total=False):
    """The options of a job but its sparsity, by type; the recipes say what they mean."""

    preset: str
    saliency: str
    gamma: float | Literal["auto"] | None
    allocation: str
    round_to: int | Literal["auto"]
    min_groups: int
    min_neurons: int | None
    cost: str
    micro_batch: int
    reconstruct: bool
    ridge: float | Literal["auto"]
    calib: str
    candidates: int | None
    num_sequences: int | None
    seq_len: int
    seed: int
    eval_text: tuple[Path, ...]
    heldout_sequences: int
    heldout_len: int
    selection_sequences: int
    selection_len: int
    recover: str | None
    recover_steps: int
    recover_method: str
    recover_teacher: str
    recover_for: str | None
    recover_dtype: str
    recover_text: str
    recover_batch: int
    recover_micro_batch: int | None
    learning_rate: float
    recover_schedule: str
    recover_warm_up: int | None
    recover_checkpointing: bool
    recover_patience: int
    recover_log: str
    recover_seq_len: int | None
    kl_weight: float
    next_token_weight: float
    states_weight: float
    lora_rank: int
    dtype: str
    flavor: str
    baseline: bool
    quantize: tuple[str, ...]
    baseline_quantized: bool
    quantize_head: bool
    engines: tuple[str, ...]
    require_kl: float | None
    require_perplexity_ratio: float | None
    run_benchmark: bool
    threads: int | None
    prompt_tokens: int
    new_tokens: int
    repeats: int


class CutOptions(JobOptions, total=False):
    """The options of a job."""

    sparsity: Required[float]


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
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def spelled_out(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function of ``**options`` with every option spelled out, for help() and editors."""
    own = inspect.signature(function)
    fixed = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [field.parameter for field in all_fields()]
    return own.replace(parameters=[fixed[0], *options, *fixed[1:]])
