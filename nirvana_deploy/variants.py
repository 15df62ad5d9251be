"""The models that an output folder holds: their names, where they lie, and what they were made from.

``dense`` is the baseline, ``pruned`` the smaller model, ``pruned-int8`` and its like the smaller model
quantized. Which of them are there is read from the manifest, so whatever measures them need not be told.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nirvana_deploy.engine.loading import MODULES
from nirvana_deploy.engine.record import ENGINE_SUFFIX, EngineRecord, read_engine_record
from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.export import MODEL_FILE
from nirvana_deploy.model.checkpoint import config_json
from nirvana_deploy.model.shape import ModelShape, shape_from_config
from nirvana_deploy.prune.plan import dense_shape, read_plan
from nirvana_deploy.run import Run

DENSE, PRUNED = "dense", "pruned"
CHECKPOINT = "checkpoint"
PLAN_FILE = "plan.json"
ONNX = "onnx"
DENSE_ONNX = "dense/onnx"
SCHEMES = ("int8", "w8", "w4")
"""Ways to quantize; each has a folder and a stage called ``onnx-<scheme>``."""


@dataclass(frozen=True)
class ModelVariant:
    """One ONNX model of an output folder."""

    name: str
    stage: str
    """The stage that makes it."""
    folder: str
    """Relative to the output folder."""
    scheme: str | None = None
    """How it is quantized; None for a float model."""

    @property
    def parent(self) -> str | None:
        """The float variant that a quantized one was made from."""
        return PRUNED if self.scheme else None


KNOWN = (
    ModelVariant(DENSE, "dense-onnx", DENSE_ONNX),
    ModelVariant(PRUNED, "onnx", ONNX),
    *(
        ModelVariant(f"{PRUNED}-{scheme}", quantize_stage, quantize_stage, scheme)
        for scheme in SCHEMES
        for quantize_stage in (f"onnx-{scheme}",)
    ),
)


def variant_named(name: str) -> ModelVariant:
    """The variant called ``name``; raises KeyError for a name that is not one of a variant."""
    return {variant.name: variant for variant in KNOWN}[name]


def variants_of(run: Run) -> tuple[ModelVariant, ...]:
    """The variants that ``run`` has made, the baseline first."""
    return tuple(variant for variant in KNOWN if variant.stage in run.manifest["stages"])


def models_for(run: Run, runtime: str | None) -> dict[ModelVariant, Path]:
    """What to run of each variant, the baseline first: its ONNX folder, or its engine of ``runtime``.

    An engine belongs to the variant whose ``model.onnx`` it was built from, or else whose name it has.
    Raises NirvanaError where ``runtime`` runs engines and the folder has none of them.
    """
    variants = variants_of(run)
    if runtime not in MODULES:
        return {variant: run.out / variant.folder for variant in variants}
    engines = _engines(run.out, runtime)
    found = {}
    for variant in variants:
        onnx = run.manifest["stages"][variant.stage]["files"].get(f"{variant.folder}/{MODEL_FILE}")
        for path, record in engines.items():
            if record.onnx_sha256.get(MODEL_FILE) == onnx or record.name == variant.name:
                found[variant] = path
    if not found:
        raise NirvanaError(
            f"{run.out} has no engine of {runtime}.",
            hint=f"nirvana-deploy build-engine {run.out} --engine {runtime}",
        )
    return found


def _engines(out: Path, runtime: str) -> dict[Path, EngineRecord]:
    paths = sorted(out.rglob(f"*{ENGINE_SUFFIX}"))
    records = {path: read_engine_record(path, check_bytes=False) for path in paths}
    return {path: record for path, record in records.items() if record.runtime == runtime}


def shape_of(out: Path, variant: ModelVariant) -> ModelShape:
    """The shape of a variant of the output folder ``out``."""
    pruned = shape_from_config(config_json(out / CHECKPOINT))
    return dense_shape(pruned, read_plan(out / PLAN_FILE)) if variant.name == DENSE else pruned
