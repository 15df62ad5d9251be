"""The records of one output folder, read together: the interface between stages and what describes them.

Nothing here opens a model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json, typed
from nirvana_deploy.output import stage
from nirvana_deploy.output.kinds.speculative import SpeculativeRecord
from nirvana_deploy.output.kinds.workloads import WorkloadsRecord
from nirvana_deploy.output.layout import (
    BENCHMARK_FILE,
    MANIFEST,
    PLAN_FILE,
    SPECULATIVE,
    SPECULATIVE_FILE,
    WORKLOADS_FILE,
)
from nirvana_deploy.output.manifest import Manifest
from nirvana_deploy.output.record_kinds import BenchmarkRecord, PlanRecord, VerifiedRecord

_SCHEMA = 1
_KINDS = {
    MANIFEST: Manifest,
    PLAN_FILE: PlanRecord,
    BENCHMARK_FILE: BenchmarkRecord,
    WORKLOADS_FILE: WorkloadsRecord,
    f"{SPECULATIVE}/{SPECULATIVE_FILE}": SpeculativeRecord,
}
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Records:
    """The parsed records of one output folder; None where a file is not there."""

    manifest: dict[str, Any] | None
    plan: dict[str, Any] | None
    benchmark: dict[str, Any] | None
    workloads: dict[str, Any] | None = None
    speculative: dict[str, Any] | None = None

    def stage(self, name: str) -> Mapping[str, Any]:
        """The manifest's entry of a stage; empty when it did not run."""
        return ((self.manifest or {}).get("stages") or {}).get(name) or {}

    def stages(self, prefix: str = "") -> tuple[str, ...]:
        """The stages that ran whose names begin with ``prefix``, in order."""
        return tuple(name for name in (self.manifest or {}).get("stages") or {} if name.startswith(prefix))

    def result(self, name: str, kind: type[Kind]) -> Kind | None:
        """What a stage recorded; None when it did not run. Raises NirvanaError for a broken record."""
        found = self.stage(name).get("result")
        return typed(found, kind, f"{MANIFEST}: the result of stage {name!r}") if found else None


def read_record(path: Path, name: str | None = None) -> dict[str, Any] | None:
    """A record, of the kind that has ``name`` [the file's]; None where it is not there.

    Raises NirvanaError for a broken one.
    """
    if not os.path.lexists(path):
        return None
    return dict(read_json(path, _KINDS[name or path.name], schema=_SCHEMA))


def read_records(out: Path) -> Records:
    """Read the records of an output folder; raises NirvanaError when it has none, or a broken one."""
    records = Records(*(read_record(out / name, name) for name in _KINDS))
    if records.manifest is not None:  # what a changed model left behind waits to be removed
        known = records.stages()
        records = replace(
            records,
            workloads=records.workloads if stage.WORKLOADS in known else None,
            speculative=records.speculative if stage.SPECULATIVE in known else None,
        )
    if records == Records(None, None, None):
        held_by_parent = (out.resolve().parent / PLAN_FILE).is_file()
        raise NirvanaError(
            f"{out} has no manifest.json, plan.json or benchmark.json, so it is not an output folder.",
            hint=f"Did you mean {out.resolve().parent}?"
            if held_by_parent
            else "Make one: nirvana-deploy prune-export MODEL --sparsity 0.4",
        )
    verifications(records)  # before anything is written
    return records


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
    """The kept width of every layer of a parsed plan.json."""
    return tuple(
        LayerWidth(
            layer=entry["layer"],
            of_groups=entry["of_groups"],
            kept_groups=tuple(entry["kept_groups"]),
            of_neurons=entry["of_neurons"],
            kept_neurons=len(entry["kept_neurons"]),
            site=entry.get("site"),
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
    found = records.result(stage.VERIFY, dict[str, VerifiedRecord]) or {}
    return tuple(_verification(model, result) for model, result in found.items())


def _verification(model: str, result: VerifiedRecord) -> Verification:
    checks = result.get("checks", [])
    greedy = [check["passed"] for check in result.get("greedy", []) if not check.get("not_run")]
    differences = [check["max_abs_diff"] for check in checks]
    return Verification(
        model=model,
        passed=result["passed"],
        num_checks=len(checks) + len(greedy),
        max_abs_diff=max((one for one in differences if one is not None), default=None),
        greedy_equal=all(greedy) if greedy else None,
        first_departure=result.get("first_departure"),
    )


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
