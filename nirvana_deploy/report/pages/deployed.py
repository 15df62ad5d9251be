"""Rows and cautions about quantized models and engines, from manifest.json and benchmark.json alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nirvana_deploy.base.units import format_bytes, format_number, format_seconds
from nirvana_deploy.output import stage
from nirvana_deploy.output.records import Records
from nirvana_deploy.output.results import EnginesBuilt, QualityMeasured, Quantized
from nirvana_deploy.output.variants import DENSE, PRUNED, quantized_variant
from nirvana_deploy.report.table import ABSENT

QUANTIZED_HEADERS = ("Model", "Linears in integer kernels", "Weight file", "KL to its float model")
ENGINE_HEADERS = ("Engine", "For", "Size", "Weights", "Fused attentions", "Built in", "GPUs")
_LOW_BIT_FILE = re.compile(r"[^\s/()]*\bI?Q[1-6]_\w*\.gguf", re.IGNORECASE)


def quantized_rows(records: Records) -> tuple[tuple[str, ...], ...]:
    """One row per quantized model; see QUANTIZED_HEADERS."""
    return tuple(
        (
            name,
            f"{result.coverage['found']:,} of {result.coverage['promised']:,}",
            format_bytes(result.weights_bytes),
            ABSENT if (kl := _kl_vs_parent(records, name)) is None else format_number(kl),
        )
        for name, result in _quantized(records)
    )


def engine_rows(records: Records) -> tuple[tuple[str, ...], ...]:
    """One row per engine; see ENGINE_HEADERS."""
    built = (records.result(name, EnginesBuilt) for name in records.stages(stage.engine("")))
    return tuple(
        (
            f"{engine.name} ({engine.dtype}, cache {engine.kv})",
            engine.runtime,
            format_bytes(engine.engine_bytes),
            format_bytes(engine.weights_bytes),
            f"{engine.fused_attentions:,}",
            format_seconds(engine.build_seconds),
            ", ".join(engine.targets),
        )
        for result in built
        if result is not None
        for engine in result.engines
    )


def measured_layers(records: Records) -> Iterator[dict[str, float]]:
    """The KL of each layer alone, for every pruned model whose layers were measured."""
    for result in (result for name, result in _quantized(records) if name.startswith(PRUNED)):
        if result.layer_kl:
            yield result.layer_kl


def quantization_caution(records: Records) -> str | None:
    """Caution about quantized models that break their promise, if any."""
    broken = [f"{name}: {result.problem}" for name, result in _quantized(records) if not result.passed]
    return f"Quantization did not hold its promise. {' '.join(broken)}" if broken else None


def kept_promises(records: Records) -> tuple[tuple[str, bool], ...]:
    """(name, whether it runs as promised) of each quantized model."""
    return tuple((name, result.passed) for name, result in _quantized(records))


def low_bit_source_caution(records: Records) -> str | None:
    """Caution about w4 measured on weights from a low-bit file, if so."""
    origin = str(((records.manifest or {}).get("model") or {}).get("origin") or "")
    file = _LOW_BIT_FILE.search(origin)
    if file is None or "w4" not in (result.scheme for _, result in _quantized(records)):
        return None
    return (
        f"The loss of w4 says little about other models: these weights came from {file[0]}, so they lay on "
        "the grid of a few bits before they were rounded here."
    )


def _quantized(records: Records) -> Iterator[tuple[str, Quantized]]:
    """Each quantized variant by name."""
    for of, prefix in ((PRUNED, stage.quantized("")), (DENSE, stage.dense_quantized(""))):
        for name in records.stages(prefix):
            if (result := records.result(name, Quantized)) is not None:
                yield quantized_variant(result.scheme, of=of).name, result


def _kl_vs_parent(records: Records, variant: str) -> float | None:
    """KL to the float model, from the quality stage, else from benchmark.json."""
    quality_stage = records.result(stage.QUALITY, QualityMeasured)
    measured = quality_stage.variants if quality_stage else {}
    of_benchmark = {v["name"]: v.get("quality") for v in (records.benchmark or {}).get("variants") or ()}
    for name, quality in {**of_benchmark, **measured}.items():
        if name == variant:
            value: float | None = (quality or {}).get("kl_vs_parent")
            return value
    return None
