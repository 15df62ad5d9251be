"""What folders have in common: without it their numbers do not compare, and the page says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

from nirvana_deploy.base.units import format_ms, format_number
from nirvana_deploy.output import stage
from nirvana_deploy.output.records import Records, model_name
from nirvana_deploy.output.results import QualityMeasured
from nirvana_deploy.report.facts import evaluation_source
from nirvana_deploy.report.table import baseline_of, median_of

_MACHINE = ("cpu", "logical_cores", "gpu", "platform", "onnxruntime")
"""Facts of the environment that times depend on."""
REQUEST = ("prompt_tokens", "new_tokens", "batch_size", "threads")
"""What of a workload its times depend on; how often it was repeated shows in their intervals."""
_SAME_TIME = 1.1
"""Ratio of the dense model's times up to which the machine was as busy."""
_SAME_PERPLEXITY = 1e-3
"""Relative difference of the dense model's perplexity below which the text was the same."""


@dataclass(frozen=True)
class Folder:
    """One finished output folder."""

    label: str
    """Its name, as far as it is needed to tell the folders apart."""
    records: Records

    @property
    def model(self) -> str:
        """Name of the model that it began with."""
        return model_name(self.records) or "unnamed model"

    @property
    def base(self) -> str:
        """What the model is, by its files; its name if they were not recorded."""
        files = ((self.records.manifest or {}).get("model") or {}).get("files")
        return repr(sorted(files.values())) if files else self.model


@dataclass(frozen=True)
class Alike:
    """Which numbers compare, and why the others do not."""

    one_model: bool
    quality: bool
    times: bool
    cautions: tuple[str, ...]


def alike(folders: Sequence[Folder]) -> Alike:
    """Look for what makes numbers of different folders different things."""
    models = _differing("the model", folders, lambda one: one.base, _model)
    machines = _differing("the machine", folders, _machine_facts, _machine)
    keys = dict.fromkeys(key for one in folders for key in _workload(one))
    workloads = [
        said for key in keys for said in _differing(key.replace("_", " "), folders, partial(_asked, key=key))
    ]
    busy = [] if models or machines or workloads else _busy(folders)
    different = [*machines, *workloads, *busy]
    times = [f"Times do not compare across these folders: {said}." for said in different]
    quality = [
        f"Quality does not compare across these folders: {said}." for said in (models or _texts(folders))
    ]
    return Alike(not models, not quality, not times, (*quality, *times))


def _differing(
    what: str,
    folders: Sequence[Folder],
    key: Callable[[Folder], Any],
    show: Callable[[Folder], Any] | None = None,
) -> list[str]:
    """A clause that names the values, if they differ; at most one."""
    values: dict[str, list[str]] = {}
    shown: dict[str, str] = {}
    for one in folders:
        found = repr(key(one))
        values.setdefault(found, []).append(one.label)
        shown.setdefault(found, str((show or key)(one)))
    if len(values) < 2:
        return []
    said = (f"{shown[value]} in {' and '.join(where)}" for value, where in values.items())
    return [f"{what} is {', '.join(said)}"]


def _model(one: Folder) -> str:
    """Its name; and some of its hash, since other files may have the same one."""
    return f"{one.model} ({sha256(one.base.encode()).hexdigest()[:8]})"


def _workload(one: Folder) -> Mapping[str, Any]:
    """What was timed, in which runtime."""
    benchmark = one.records.benchmark or {}
    runtimes = sorted({str(variant.get("runtime")) for variant in benchmark.get("variants") or ()})
    asked = benchmark.get("workload") or {}
    workload = {key: asked[key] for key in REQUEST if key in asked}
    return {**workload, "runtime": ", ".join(runtimes)}


def _asked(one: Folder, key: str) -> Any:
    return _workload(one).get(key)


def _machine_facts(one: Folder) -> list[Any]:
    environment = (one.records.benchmark or {}).get("environment") or {}
    return [environment.get(key) for key in _MACHINE]


def _machine(one: Folder) -> str:
    return ", ".join(str(value) for value in _machine_facts(one) if value is not None) or "not recorded"


def _busy(folders: Sequence[Folder]) -> list[str]:
    """A machine that was busier once shows in the dense model, which is the same everywhere."""
    baselines = {one.label: baseline_of(one.records.benchmark or {}) or {} for one in folders}
    measured = {label: median_of(found, "tpot_ms") for label, found in baselines.items()}
    known = {label: found for label, found in measured.items() if found is not None}
    if not known or max(known.values()) <= _SAME_TIME * min(known.values()):
        return []
    said = ", ".join(f"{format_ms(found)} in {label}" for label, found in known.items())
    return [f"a token of the dense model itself took {said}"]


def _texts(folders: Sequence[Folder]) -> list[str]:
    """The text is not kept: its name, and what the dense model makes of it, tell one from another."""
    what = "the text of evaluation"
    if said := _differing(what, folders, lambda one: evaluation_source(one.records), _text):
        return said
    known = [found for one in folders if (found := _dense_perplexity(one)) is not None]
    if known and max(known) > (1 + _SAME_PERPLEXITY) * min(known):
        return _differing(what, folders, _text)
    return []


def _text(one: Folder) -> str:
    perplexity = _dense_perplexity(one)
    measured = "" if perplexity is None else f" (perplexity of dense {format_number(perplexity)})"
    return f"{evaluation_source(one.records) or 'not recorded'}{measured}"


def _dense_perplexity(one: Folder) -> float | None:
    baseline = baseline_of(one.records.benchmark or {})
    measured = one.records.result(stage.QUALITY, QualityMeasured)
    of_stage = measured.variants.get(str(baseline["name"]), {}) if measured and baseline else {}
    of_benchmark = (baseline or {}).get("quality") or {}
    found: float | None = of_stage.get("perplexity") or of_benchmark.get("perplexity")
    return found
