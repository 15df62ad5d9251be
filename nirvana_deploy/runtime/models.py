"""What a runtime runs of each model of an output folder: its ONNX folder or its engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.output.layout import CHECKPOINT, MODEL_FILE
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.variants import DENSE, PRUNED, ModelVariant, variants_of
from nirvana_deploy.runtime.table import runtime_named
from nirvana_deploy.runtime.tensorrt.record import DECODER, ENGINE_SUFFIX, EngineRecord, read_engine_record

_ADDED_TO_NAMES = ("bf16", "fp32", "in-place", "tensorrt")
"""What an engine's name says beside its variant, in this order."""


def models_for(run: Run, runtime: str | None) -> dict[ModelVariant, Path]:
    """What to run of each variant, the baseline first: its ONNX folder, checkpoint, or engine of ``runtime``.

    Of several engines, the one with the plainest name (``pruned`` before ``pruned-in-place``). Raises
    NirvanaError where ``runtime`` runs engines and the folder has none of them.
    """
    takes = "onnx" if runtime is None else runtime_named(runtime).takes
    if takes == "checkpoint":  # quantized models have none
        checkpoints = {DENSE: run.dense, PRUNED: run.out / CHECKPOINT}
        return {one: checkpoints[one.name] for one in variants_of(run) if one.name in checkpoints}
    if runtime is None or takes == "onnx":
        return {variant: run.out / variant.folder for variant in variants_of(run)}
    if takes == "gguf":
        raise NirvanaError(
            f"{runtime} runs GGUF files, and the models of {run.out} are ONNX folders.",
            hint=f"Time both: nirvana-deploy package {run.out} --gguf, then "
            f"nirvana-deploy benchmark {run.out} FILE.gguf",
        )
    engines = engines_of(run, runtime)
    found: dict[ModelVariant, Path] = {}
    for variant in variants_of(run):
        for path, made_from in engines.items():
            if made_from == variant:
                found.setdefault(variant, path)
    return found


def place_of(run: Run, path: Path) -> str:
    """A path for records: relative to the output folder if it lies there."""
    return path.relative_to(run.out).as_posix() if path.is_relative_to(run.out) else str(path)


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
