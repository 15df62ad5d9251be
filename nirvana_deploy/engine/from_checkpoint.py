"""From a checkpoint to engines: the ONNX graphs that the builder wants, then the builds.

An engine wants another graph than a CPU does: half precision, for an in-place cache one of fixed length, and
integers behind DequantizeLinear. So the graph is exported anew, quantized by what was decided before, and
kept in ``<name>-onnx`` beside the engine: it is what the engine is verified against, and what the vendor's
tool takes to build the same engine elsewhere.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.engine.build import BuiltEngine, engine_from_onnx
from nirvana_deploy.engine.drop_branch import drop_cache_branch
from nirvana_deploy.engine.profile import require_lengths
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.targets import RTX, BuilderOptions
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, config_json
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import SafetensorsWeights
from nirvana_deploy.output.layout import DECODER_FILE, ENCODER_FILE, MODEL_FILE
from nirvana_deploy.quantize.graph.linears import RECORD_FILE, open_folder, write_folder
from nirvana_deploy.quantize.int8.decide import apply_to
from nirvana_deploy.quantize.int8.spec import Int8Spec, record_of
from nirvana_deploy.quantize.quantize import quantize_onnx
from nirvana_deploy.quantize.weights.fp8 import FP8_TARGETS, rewrite_fp8
from nirvana_deploy.runtime.tensorrt.loading import tensorrt_module

KV_FORMS = {"concat": "portable", "in-place": "static-cache"}
"""How the cache is kept -> the flavor of the graph."""
DEFAULT_CACHE_TOKENS = 2048


def engines_from_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    name: str,
    dtype: str = "fp16",
    kv: str = "concat",
    quantize: str | None = None,
    int8_spec: Int8Spec | None = None,
    block_size: int = 32,
    rounding: str | None = None,
    calibration: NDArray[np.int64] | None = None,
    lengths: Lengths | None = None,
    options: BuilderOptions | None = None,
    progress: Progress = SILENT,
) -> tuple[BuiltEngine, ...]:
    """Export ``checkpoint`` for an engine, quantize it, and build ``out``/``name``.engine.

    ``kv`` is "concat" (a cache that grows) or "in-place" (of fixed length, ``lengths.max_length`` or 2048
    tokens, updated where it lies). ``quantize`` is "int8", applied from ``int8_spec``; "w8" or "w4" (blocks
    of ``block_size``, ``rounding`` as in ``quantize_onnx``, on ``calibration`` where it is calibrated); "fp8"
    (weights alone, for sm89 and newer). An encoder-decoder gives two engines, ``name``-encoder and
    ``name``-decoder.

    Raises NirvanaError for a combination that does not exist, and what :func:`engine_from_onnx` raises.
    """
    look_up(kv, KV_FORMS, what="KV form")
    options, lengths = options or BuilderOptions(RTX), lengths or Lengths()
    tensorrt_module(options.runtime)  # before the work of the export
    config = config_json(checkpoint)
    require_lengths(lengths, context_tokens=config.get("max_position_embeddings"))
    shape = shape_from_config(config)
    _require_possible(shape, dtype=dtype, kv=kv, quantize=quantize, int8_spec=int8_spec, options=options)
    if quantize == "fp8" and options.runtime == RTX:
        options = replace(options, targets=options.targets or FP8_TARGETS)
    onnx = onnx_for_engine(
        checkpoint,
        out / f"{name}-onnx",
        dtype=dtype,
        kv=kv,
        quantize=quantize,
        int8_spec=int8_spec,
        block_size=block_size,
        rounding=rounding,
        calibration=calibration,
        cache_tokens=lengths.max_length,
        progress=progress,
    )
    parts = {MODEL_FILE: ("decoder", name)}
    if shape.family.encoder_decoder:
        parts = {ENCODER_FILE: ("encoder", f"{name}-encoder"), DECODER_FILE: ("decoder", f"{name}-decoder")}
    return tuple(
        engine_from_onnx(
            onnx,
            out,
            name=part_name,
            file=file,
            part=part,
            lengths=lengths,
            shape=None if shape.family.encoder_decoder else shape,
            checkpoint=None if quantize else SafetensorsWeights(checkpoint),
            options=options,
            progress=progress,
        )
        for file, (part, part_name) in parts.items()
    )


def onnx_for_engine(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str = "fp16",
    kv: str = "concat",
    quantize: str | None = None,
    int8_spec: Int8Spec | None = None,
    block_size: int = 32,
    rounding: str | None = None,
    calibration: NDArray[np.int64] | None = None,
    cache_tokens: int | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Write the ONNX folder ``out`` that a builder is given; arguments as in :func:`engines_from_checkpoint`.

    ``cache_tokens`` is C of an in-place cache. [2048, or the model's context when that is shorter]
    """
    exported = out if quantize is None else out.with_name(f".{out.name}-float")
    try:
        onnx_from_checkpoint(
            Checkpoint.open(checkpoint),
            exported,
            dtype=dtype,
            flavor=look_up(kv, KV_FORMS, what="KV form"),
            cache_tokens=cache_tokens or _cache_tokens(checkpoint) if kv == "in-place" else None,
            progress=progress,
        )
        if int8_spec is not None and quantize == "int8":
            _apply_int8(exported, out, int8_spec, progress)
        elif quantize == "fp8":
            graphs = open_folder(exported)
            record = record_of(scheme="fp8", linears=rewrite_fp8(graphs))
            write_folder(exported, out, graphs, records={RECORD_FILE: record}, progress=progress)
        elif quantize is not None:
            quantize_onnx(
                exported,
                out,
                scheme=quantize,
                block_size=block_size,
                rounding=rounding,
                calibration=calibration,
                writing="tensorrt",
                progress=progress,
            )
    finally:
        if exported != out:
            shutil.rmtree(exported, ignore_errors=True)
    if (out / DECODER_FILE).is_file():
        drop_cache_branch(out / DECODER_FILE)
    return out


def _require_possible(
    shape: ModelShape,
    *,
    dtype: str,
    kv: str,
    quantize: str | None,
    int8_spec: Int8Spec | None,
    options: BuilderOptions,
) -> None:
    """Refuse what cannot be built, before the export."""
    if kv == "in-place" and shape.family.encoder_decoder:
        raise NirvanaError(
            f"The cache of an encoder-decoder ({shape.family.name}) is not updated in place.",
            hint="--kv concat",
        )
    old = [target for target in options.targets or () if target not in FP8_TARGETS]
    if quantize == "fp8" and old:
        raise NirvanaError(
            f"fp8 needs Ada or newer, and {', '.join(old)} is older.",
            hint=f"--target {','.join(FP8_TARGETS)}, or --quantize w8, which takes the same bytes anywhere.",
        )
    if quantize is not None and dtype == "fp32":
        raise NirvanaError(
            f"An engine quantized as {quantize} computes the rest in half precision, not in fp32.",
            hint="--dtype fp16",
        )
    if quantize == "int8" and int8_spec is None:
        raise NirvanaError(
            "An int8 engine takes the ranges of its activations from a quantized ONNX folder, and "
            "there is none.",
            hint="nirvana-deploy quantize OUT --scheme int8, then build-engine OUT --quantize int8",
        )


def _cache_tokens(checkpoint: Path) -> int:
    """C where none was asked for: 2048, or the model's context when that is shorter."""
    context = config_json(checkpoint).get("max_position_embeddings")
    return min(DEFAULT_CACHE_TOKENS, context or DEFAULT_CACHE_TOKENS)


def _apply_int8(source: Path, out: Path, spec: Int8Spec, progress: Progress) -> None:
    """The decisions of an int8 folder, on a graph for engines: no ONNX Runtime kernels are promised."""
    graphs = open_folder(source)
    apply_to(graphs, spec)
    record = record_of(scheme="int8", applied=True, int8=spec.to_json())
    write_folder(source, out, graphs, records={RECORD_FILE: record}, progress=progress)
