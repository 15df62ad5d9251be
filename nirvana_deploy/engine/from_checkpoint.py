"""From a checkpoint to engines: the ONNX graphs that the builder wants, then the builds.

An engine wants another graph than a CPU does: half precision, for an in-place cache one of fixed length, and
integers behind DequantizeLinear. So the graph is exported anew, quantized by what was decided before, and
kept in ``<name>-onnx`` beside the engine: it is what the engine is verified against, and what the vendor's
tool takes to build the same engine elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.temporary import scratch_folder
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.engine.build import BuiltEngine, engines_from_folder
from nirvana_deploy.engine.drop_branch import drop_cache_branch
from nirvana_deploy.engine.profile import require_lengths
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.targets import RTX, BuilderOptions
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.layout import DECODER_FILE
from nirvana_deploy.quantize.folder import quantize_onnx, write_quantized
from nirvana_deploy.quantize.rewriting import QuantizeInputs
from nirvana_deploy.runtime.tensorrt.loading import tensorrt_module

KV_FORMS = {"concat": "portable", "in-place": "static-cache"}
"""How the cache is kept -> the flavor of the graph."""
DEFAULT_CACHE_TOKENS = 2048


def engines_from_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    name: str,
    dtype: str = "fp16",
    kv: str = "concat",
    quantize: QuantizeInputs | None = None,
    lengths: Lengths | None = None,
    options: BuilderOptions | None = None,
    progress: Progress = SILENT,
) -> tuple[BuiltEngine, ...]:
    """Export ``checkpoint`` for an engine, quantize it, and build ``out``/``name``.engine.

    ``kv`` is "concat" (a cache that grows) or "in-place" (of fixed length, ``lengths.max_length`` or 2048
    tokens, updated where it lies). An encoder-decoder gives two engines, ``name``-encoder and
    ``name``-decoder.

    Raises NirvanaError for a combination that does not exist, and what :func:`engine_from_onnx` raises.
    """
    look_up(kv, KV_FORMS, what="KV form")
    options, lengths = options or BuilderOptions(RTX), lengths or Lengths()
    tensorrt_module(options.runtime)  # before the work of the export
    require_lengths(lengths, context_tokens=checkpoint.context_tokens)
    shape = checkpoint.shape
    if kv == "in-place" and shape.family.encoder_decoder:
        raise NirvanaError(
            f"The cache of an encoder-decoder ({shape.family.name}) is not updated in place.",
            hint="--kv concat",
        )
    if quantize is not None:
        _require_possible(quantize, dtype=dtype, targets=options.targets)
        if options.runtime == RTX:
            options = replace(options, targets=options.targets or quantize.scheme.engine_targets)
    onnx = onnx_for_engine(
        checkpoint,
        out / f"{name}-onnx",
        dtype=dtype,
        kv=kv,
        quantize=quantize,
        cache_tokens=lengths.max_length,
        progress=progress,
    )
    return engines_from_folder(
        onnx,
        out,
        name=name,
        lengths=lengths,
        shape=None if shape.family.encoder_decoder else shape,
        checkpoint=None if quantize else checkpoint.multiplied_weights,
        options=options,
        progress=progress,
    )


def onnx_for_engine(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: str = "fp16",
    kv: str = "concat",
    quantize: QuantizeInputs | None = None,
    cache_tokens: int | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Write the ONNX folder ``out`` that a builder is given; arguments as in :func:`engines_from_checkpoint`.

    ``cache_tokens`` is C of an in-place cache. [2048, or the model's context when that is shorter]
    """
    with scratch_folder(out.parent) as scratch:
        exported = out if quantize is None else scratch / "float"
        onnx_from_checkpoint(
            checkpoint,
            exported,
            dtype=dtype,
            flavor=look_up(kv, KV_FORMS, what="KV form"),
            cache_tokens=cache_tokens or _cache_tokens(checkpoint) if kv == "in-place" else None,
            progress=progress,
        )
        if quantize is not None:
            _quantized(exported, out, quantize, progress)
    if (out / DECODER_FILE).is_file():
        drop_cache_branch(out / DECODER_FILE)
    return out


def _require_possible(quantize: QuantizeInputs, *, dtype: str, targets: Sequence[str] | None) -> None:
    """Refuse what cannot be built, before the export."""
    scheme = quantize.scheme
    able = scheme.engine_targets
    unable = [target for target in targets or () if able is not None and target not in able]
    if able is not None and unable:
        raise NirvanaError(
            f"{scheme.name} needs one of {', '.join(able)}, and {', '.join(unable)} has no kernels for it.",
            hint=f"--target {','.join(able)}, or --quantize with another precision.",
        )
    if dtype == "fp32":
        raise NirvanaError(
            f"An engine quantized as {scheme.name} computes the rest in half precision, not in fp32.",
            hint="--dtype fp16",
        )
    if scheme.engine_applies_decision and quantize.decided is None:
        raise NirvanaError(
            f"An {scheme.name} engine takes the ranges of its activations from a quantized ONNX folder, and "
            "there is none.",
            hint=f"nirvana-deploy quantize OUT --scheme {scheme.name}, then build-engine OUT --quantize "
            f"{scheme.name}",
        )


def _quantized(source: Path, out: Path, quantize: QuantizeInputs, progress: Progress) -> None:
    """Quantize the ONNX folder ``source`` for a builder; what ONNX Runtime can run is counted in it."""
    scheme = quantize.scheme
    if scheme.only_engines is not None or quantize.decided is not None:
        write_quantized(source, out, quantize, progress=progress)
        return
    recipe = replace(quantize.recipe, writing="tensorrt")
    quantize_onnx(source, out, recipe, calibration=quantize.calibration, progress=progress)


def _cache_tokens(checkpoint: Checkpoint) -> int:
    """C where none was asked for: 2048, or the model's context when that is shorter."""
    return min(DEFAULT_CACHE_TOKENS, checkpoint.context_tokens or DEFAULT_CACHE_TOKENS)
