"""plan.json: a plan as a file, checked when it is read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.family import DECODER
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.output.layout import CHECKPOINT, PLAN_FILE
from nirvana_deploy.output.variants import ModelVariant
from nirvana_deploy.prune.plan import PrunePlan, dense_shape

PLAN_SCHEMA = 1


def write_plan(plan: PrunePlan, path: Path) -> None:
    """Write ``plan.json``; the same plan gives the same bytes."""
    data = {"schema": PLAN_SCHEMA, **asdict(plan)}
    for optional in ("reconstruct", "curves"):
        if data[optional] is None:
            del data[optional]
    if all(layer.site == DECODER for layer in plan.layers):
        for layer in data["layers"]:
            del layer["site"]  # a decoder-only model has one kind of layer, which needs no name
    write_json(path, data)


def read_plan(path: Path) -> PrunePlan:
    """Read and check a ``plan.json``; raises NirvanaError that says what is wrong with it."""
    plan = read_json(path, PrunePlan, schema=PLAN_SCHEMA)
    for number, layer in enumerate(plan.layers):
        where = f"{path}: layers[{number}]"
        _require_indices(f"{where}.kept_groups", layer.kept_groups, layer.of_groups)
        _require_indices(f"{where}.kept_neurons", layer.kept_neurons, layer.of_neurons)
    return plan


def _require_indices(where: str, kept: tuple[int, ...], of: int) -> None:
    if (of and not kept) or list(kept) != sorted(set(kept)) or not all(0 <= index < of for index in kept):
        raise NirvanaError(f"{where} must be sorted, unique, at least one and in [0, {of}).")


def shape_of(out: Path, variant: ModelVariant) -> ModelShape:
    """The shape of a variant of the output folder ``out``."""
    pruned = Checkpoint.open(out / CHECKPOINT).shape
    return dense_shape(pruned, read_plan(out / PLAN_FILE)) if variant.dense else pruned
