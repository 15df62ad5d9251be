"""ONNX Runtime's execution providers as runtimes, with the options that a decoder needs.

The two TensorRT providers would rebuild their engine whenever decode grows the cache, so every dynamic
input gets a range: past length 0 to :data:`TOTAL_TOKENS`, best at one new token with half of the cache
filled. Ranges follow the graph's own dimensions, since layers differ in KV heads. Engines and kernels are
cached in the user's cache folder. **None of the GPU providers has run yet**; their options are tested as
text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.gguf.convert import cache_folder
from nirvana_deploy.output.layout import MODEL_FILE, is_seq2seq
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.onnxruntime.encoder_decoder import OrtSeq2Seq
from nirvana_deploy.runtime.table import runtime_named

if TYPE_CHECKING:
    import onnx

_WITHOUT_RANGES = ("CPUExecutionProvider", "CUDAExecutionProvider")

TOTAL_TOKENS = 2048
"""Longest sequence, prompt and answer together, that a TensorRT provider's engine is built for."""

Dimensions = Sequence[int | str]


def open_decoder(path: Path, *, runtime: str, threads: int | None = None) -> OrtDecoder | OrtSeq2Seq:
    """Open an ONNX folder with the provider of ``runtime``; raises NirvanaError where it is not there.

    An encoder-decoder has no ranges for the TensorRT providers, and they are refused.
    """
    row = runtime_named(runtime)
    provider = row.provider or runtime
    if not available(provider):
        raise NirvanaError(
            f"This onnxruntime has no {provider}, which the runtime {runtime} is.",
            hint=f"{row.install}; then: nirvana-deploy doctor",
        )
    if is_seq2seq(path):
        if provider not in _WITHOUT_RANGES:
            raise NirvanaError(
                f"The runtime {runtime} builds an engine for ranges of shapes, "
                "and an encoder-decoder has none here.",
                hint="Run it with onnxruntime-cpu or onnxruntime-cuda.",
            )
        return OrtSeq2Seq(path, threads=threads, provider=provider)
    return OrtDecoder(path, threads=threads, provider=provider, provider_options=options_for(path, provider))


def open_on_cpu(
    folder: Path, *, threads: int | None = None, in_float32: bool = False, profile: Path | None = None
) -> OrtDecoder | OrtSeq2Seq:
    """Open an ONNX folder on the CPU; ``in_float32`` computes in float32 whatever it stores.

    With ``profile`` its sessions write what ``end_profiling`` returns, into files whose names begin so.
    """
    kind = OrtSeq2Seq if is_seq2seq(folder) else OrtDecoder
    return kind(folder, threads=threads, in_float32=in_float32, profile=profile)


def available(provider: str) -> bool:
    """Whether the installed onnxruntime was built with ``provider``; whether it runs shows on loading."""
    import onnxruntime

    return provider in onnxruntime.get_available_providers()


def options_for(folder: Path, provider: str) -> dict[str, str]:
    """The options of ``provider`` for the decoder in ``folder``; values are strings, as it wants them."""
    if provider in _WITHOUT_RANGES:
        return {}
    import onnx

    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    inputs = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    cache = cache_folder() / "providers" / _digest(folder, model)[:16]
    cache.mkdir(parents=True, exist_ok=True)
    return tensorrt_options(provider, inputs, cache=cache)


def _digest(folder: Path, model: onnx.ModelProto) -> str:
    """Of the graph and of the files its weights lie in, which those of another fine-tune differ in alone."""
    data = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = [folder / name for name in (MODEL_FILE, *sorted(data))]
    return hashlib.sha256(" ".join(sha256_of(file) for file in files).encode()).hexdigest()


def tensorrt_options(
    provider: str, inputs: Mapping[str, Dimensions], *, cache: Path, total_tokens: int = TOTAL_TOKENS
) -> dict[str, str]:
    """Options of a TensorRT provider for a decoder's ``inputs``, by name with their dimensions."""
    least = _shapes(inputs, new=1, past=0, total=1)
    best = _shapes(inputs, new=1, past=total_tokens // 2, total=total_tokens // 2 + 1)
    most = _shapes(inputs, new=total_tokens, past=total_tokens - 1, total=total_tokens)
    prefix = "nv" if provider == "NvTensorRTRTXExecutionProvider" else "trt"
    options = {
        f"{prefix}_profile_min_shapes": least,
        f"{prefix}_profile_opt_shapes": best,
        f"{prefix}_profile_max_shapes": most,
    }
    if prefix == "nv":
        return options | {"nv_runtime_cache_path": str(cache)}
    return options | {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
    }


def _shapes(inputs: Mapping[str, Dimensions], *, new: int, past: int, total: int) -> str:
    """``input_ids:1x4,past_key_values.0.key:1x3x0x64,...``: every dynamic input at these lengths."""
    sizes = {
        "batch_size": 1,
        "sequence_length": new,
        "past_sequence_length": past,
        "total_sequence_length": total,
    }
    parts = []
    for name, dimensions in inputs.items():
        if all(isinstance(size, int) for size in dimensions):
            continue
        unknown = [size for size in dimensions if isinstance(size, str) and size not in sizes]
        if unknown:
            raise NirvanaError(
                f"{name} has the dimension {unknown[0]!r}; a range is known for {', '.join(sizes)}."
            )
        shape = (size if isinstance(size, int) else sizes[size] for size in dimensions)
        parts.append(f"{name}:{'x'.join(map(str, shape))}")
    return ",".join(parts)
