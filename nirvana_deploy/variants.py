"""The models that an output folder holds: their names, where they lie, and what they were made from.

``dense`` is the baseline, ``pruned`` the smaller model, ``pruned-int8`` and its like the smaller model
quantized. Which of them are there is read from the manifest, so whatever measures them need not be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nirvana_deploy.engine.loading import MODULES
from nirvana_deploy.engine.record import DECODER, ENGINE_SUFFIX, EngineRecord, read_engine_record
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
_ADDED_TO_NAMES = ("bf16", "fp32", "in-place", "tensorrt")
"""What an engine's name says beside its variant, in this order."""
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

    Of several engines, the one with the plainest name (``pruned`` before ``pruned-in-place``). Raises
    NirvanaError where ``runtime`` runs engines and the folder has none of them.
    """
    if runtime not in MODULES:
        return {variant: run.out / variant.folder for variant in variants_of(run)}
    engines = engines_of(run, runtime)
    found: dict[ModelVariant, Path] = {}
    for variant in variants_of(run):
        for path, made_from in engines.items():
            if made_from == variant:
                found.setdefault(variant, path)
    return found


def engines_of(run: Run, runtime: str) -> dict[Path, ModelVariant]:
    """Every engine of ``runtime`` that is one of a variant, the plainest names first.

    An engine belongs to the variant whose ``model.onnx`` it was built from, or else to the one whose name it
    has, with nothing but dtype, form of the cache and runtime added. An encoder-decoder's two engines count
    as one, by their decoder. Raises NirvanaError for none.
    """
    variants = variants_of(run)
    paths = sorted(run.out.rglob(f"*{ENGINE_SUFFIX}"), key=lambda path: (len(path.stem), path))
    records = {path: read_engine_record(path, check_bytes=False) for path in paths}
    engines = {}
    for path, record in records.items():
        origin = _origin(run, record, variants) if record.runtime == runtime else None
        if origin is not None:
            engines[path] = origin
    if not engines:
        raise NirvanaError(
            f"{run.out} has no engine of {runtime}.",
            hint=f"nirvana-deploy build-engine {run.out} --engine {runtime}",
        )
    return engines


def _origin(run: Run, record: EngineRecord, variants: Sequence[ModelVariant]) -> ModelVariant | None:
    built_from = record.onnx_sha256.get(MODEL_FILE)
    for variant in variants:
        files = run.manifest["stages"][variant.stage]["files"]
        if built_from is not None and files.get(f"{variant.folder}/{MODEL_FILE}") == built_from:
            return variant
    for variant in sorted(variants, key=lambda one: -len(one.name)):
        rest = record.name.removeprefix(variant.name).removesuffix(f"-{DECODER}")
        for added in _ADDED_TO_NAMES:
            rest = rest.removeprefix(f"-{added}")
        if record.name.startswith(variant.name) and not rest:
            return variant
    return None


def shape_of(out: Path, variant: ModelVariant) -> ModelShape:
    """The shape of a variant of the output folder ``out``."""
    pruned = shape_from_config(config_json(out / CHECKPOINT))
    return dense_shape(pruned, read_plan(out / PLAN_FILE)) if variant.name == DENSE else pruned
