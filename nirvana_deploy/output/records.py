"""What an output folder holds, read from its records: what was kept and where, sizes, stages, verification.

The records (manifest.json, plan.json, benchmark.json) are the interface between the stages and everything
that describes them; nothing here opens a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nirvana_deploy.base.artifact import files_under
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.output import stage

_SCHEMA = 1
Kind = TypeVar("Kind")


@contextmanager
def complete(record: str) -> Iterator[None]:
    """Turn a missing or misshapen field of ``record`` into a NirvanaError that names both."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, msgspec.ValidationError) as error:
        raise NirvanaError(
            f"{record} is not complete: {type(error).__name__} {error}.",
            hint="Was it edited by hand? nirvana-deploy prune-export ... --resume writes it again.",
        ) from error


def _read_record(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    record = read_json(path)
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != _SCHEMA:
        raise NirvanaError(
            f"{path} has schema {schema!r}; this version reads schema {_SCHEMA}.",
            hint="pip install --upgrade nirvana-deploy",
        )
    return dict(record)


@dataclass(frozen=True)
class Records:
    """The parsed records of one output folder; None where a file is not there."""

    manifest: dict[str, Any] | None
    plan: dict[str, Any] | None
    benchmark: dict[str, Any] | None

    def stage(self, name: str) -> Mapping[str, Any]:
        """The manifest's entry of a stage; empty when it did not run."""
        return ((self.manifest or {}).get("stages") or {}).get(name) or {}

    def stages(self, prefix: str = "") -> tuple[str, ...]:
        """The stages that ran whose names begin with ``prefix``, in order."""
        return tuple(name for name in (self.manifest or {}).get("stages") or {} if name.startswith(prefix))

    def result(self, name: str, kind: type[Kind]) -> Kind | None:
        """What a stage recorded; None when it did not run. Raises NirvanaError for a broken record."""
        found = self.stage(name).get("result")
        if not found:
            return None
        with complete(f"manifest.json: the result of stage {name!r}"):
            return msgspec.convert(found, kind)


def read_records(out: Path) -> Records:
    """Read the records of an output folder.

    Raises NirvanaError when the folder has none of them, or one is not valid JSON of a known schema.
    """
    records = Records(*(_read_record(out / f"{name}.json") for name in ("manifest", "plan", "benchmark")))
    if records == Records(None, None, None):
        held_by_parent = (out.resolve().parent / "plan.json").is_file()
        raise NirvanaError(
            f"{out} has no manifest.json, plan.json or benchmark.json, so it is not an output folder.",
            hint=f"Did you mean {out.resolve().parent}?"
            if held_by_parent
            else "Make one: nirvana-deploy prune-export MODEL --sparsity 0.4",
        )
    _require_fields(records)
    return records


_BUDGET_FIELDS = (
    "asked_removed_share",
    "met_removed_share",
    "removed_groups",
    "of_groups",
    "removed_neurons",
    "of_neurons",
    "parameters_dense",
    "parameters_kept",
)


def _require_fields(records: Records) -> None:
    """Find a misshapen record here, where it can be named, and not in the middle of a report."""
    if records.plan is not None:
        layer_widths(records.plan)
    with complete("plan.json"):
        budget = (records.plan or {}).get("budget")
        if budget:
            for field in _BUDGET_FIELDS:
                float(budget[field])
    with complete("benchmark.json"):
        for variant in (records.benchmark or {}).get("variants") or ():
            str(variant["name"])
            for metric in ("tpot_ms", "prefill_ms", "ttft_ms"):
                float((variant.get(metric) or {"p50": 0})["p50"])
    verifications(records)


@dataclass(frozen=True)
class LayerWidth:
    """What one layer kept."""

    layer: int
    of_groups: int
    kept_groups: tuple[int, ...]
    """Indices of the KV groups kept, ascending."""
    of_neurons: int
    kept_neurons: int
    """How many FFN neurons were kept."""
    site: str | None = None
    """In an encoder-decoder: "encoder", "decoder" or "cross" (a cross-attention, which has no FFN)."""

    @property
    def label(self) -> str:
        """For people: "3", or "encoder 3"."""
        return str(self.layer) if self.site is None else f"{self.site} {self.layer}"


def layer_widths(plan: Mapping[str, Any]) -> tuple[LayerWidth, ...]:
    """The kept width of every layer of a parsed plan.json; raises NirvanaError when fields are missing."""
    with complete("plan.json"):
        return tuple(
            LayerWidth(
                layer=msgspec.convert(entry["layer"], int),
                of_groups=msgspec.convert(entry["of_groups"], int),
                kept_groups=msgspec.convert(entry["kept_groups"], tuple[int, ...]),
                of_neurons=msgspec.convert(entry["of_neurons"], int),
                kept_neurons=len(msgspec.convert(entry["kept_neurons"], tuple[int, ...])),
                site=msgspec.convert(entry.get("site"), str | None),
            )
            for entry in plan["layers"]
        )


@dataclass(frozen=True)
class Verification:
    """How one exported model compared with the model it was made from."""

    model: str
    passed: bool
    num_checks: int
    max_abs_diff: float | None
    """Largest difference of a logit over all checks."""
    greedy_equal: bool | None
    """Every runtime that was asked generated torch's greedy tokens; None when none was asked."""
    first_departure: str | None
    """Where the two first differ, when they do: "embedding", "layer 3", ..."""


def verifications(records: Records) -> tuple[Verification, ...]:
    """What the verify stage found for each model, in its order; empty when it did not run."""
    found = []
    with complete("manifest.json: the result of stage 'verify'"):
        for model, result in (records.stage(stage.VERIFY).get("result") or {}).items():
            if not isinstance(result, dict) or "passed" not in result:
                continue
            checks = result.get("checks") or []
            greedy = [check["passed"] for check in result.get("greedy") or [] if not check.get("not_run")]
            found.append(
                Verification(
                    model=model,
                    passed=bool(result["passed"]),
                    num_checks=len(checks) + len(greedy),
                    max_abs_diff=max((float(c["max_abs_diff"]) for c in checks), default=None),
                    greedy_equal=all(greedy) if greedy else None,
                    first_departure=result.get("first_departure"),
                )
            )
    return tuple(found)


@dataclass(frozen=True)
class Inspection:
    """Everything ``inspect`` says about an output folder or a plan."""

    path: str
    model: str | None
    plan: dict[str, Any]
    """The plan without its layers: sparsity, gamma, saliency, budget, calibration; empty without a plan."""
    layers: tuple[LayerWidth, ...]
    stages: dict[str, dict[str, Any]]
    """Per stage that ran: ``seconds`` and ``peak_rss_bytes``."""
    verification: tuple[Verification, ...]
    folder_bytes: dict[str, int]
    """Bytes on disk of each folder of artifacts, relative to ``path``; "." is the folder itself."""
    missing_files: tuple[str, ...]
    """Files the manifest lists that are not on disk."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def _folder_bytes(out: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path in files_under(out):
        folder = path.parent.relative_to(out).as_posix()
        sizes[folder] = sizes.get(folder, 0) + path.stat().st_size
    return sizes


def listed_files(records: Records) -> dict[str, str]:
    """Every file that the manifest's stages wrote: path relative to the output folder -> sha256."""
    stages = ((records.manifest or {}).get("stages") or {}).values()
    return {name: digest for stage in stages for name, digest in (stage.get("files") or {}).items()}


def model_name(records: Records) -> str | None:
    """The model's short name, from the manifest or else the plan."""
    for record in (records.manifest, records.plan):
        name = ((record or {}).get("model") or {}).get("name")
        if name:
            return str(name)
    return None


def inspect_path(path: Path) -> Inspection:
    """Describe an output folder, or a plan.json alone.

    Raises NirvanaError when ``path`` does not exist, is no output folder, or holds a broken record.
    """
    if not path.exists():
        raise NirvanaError(f"{path} does not exist.", hint="Give an output folder or a plan.json.")
    is_folder = path.is_dir()
    records = read_records(path) if is_folder else Records(None, _read_record(path), None)
    if not is_folder:
        _require_fields(records)
    plan = records.plan or {}
    stages = ((records.manifest or {}).get("stages") or {}).items()
    return Inspection(
        path=str(path),
        model=model_name(records),
        plan={key: value for key, value in plan.items() if key != "layers"},
        layers=layer_widths(plan) if plan else (),
        stages={
            name: {key: stage.get(key) for key in ("seconds", "peak_rss_bytes")} for name, stage in stages
        },
        verification=verifications(records),
        folder_bytes=_folder_bytes(path) if is_folder else {},
        missing_files=tuple(name for name in listed_files(records) if not (path / name).is_file())
        if is_folder
        else (),
    )
