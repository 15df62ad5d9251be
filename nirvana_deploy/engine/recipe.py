"""Options for TensorRT engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nirvana_deploy.base.recipe import Option, recipe
from nirvana_deploy.quantize.schemes import SCHEMES
from nirvana_deploy.runtime.table import DEFAULT_ENGINE, engine_runtimes


@recipe
class Engines:
    """Engines of every model in an output folder."""

    engines: Annotated[
        tuple[str, ...],
        Option(
            "Build float16 engines too, of dense, pruned and quantized models; several separated by commas. "
            "tensorrt-rtx builds without a GPU. 'build-engine' has all options.",
            choices=engine_runtimes,
            flag="--engine",
            resumable=True,
        ),
    ] = ()


@recipe
class EngineForm:
    """Source and form of one engine."""

    variant: Annotated[str, Option("Model of an output folder.", choices=("pruned", "dense"))] = "pruned"
    dtype: Annotated[
        str,
        Option(
            "Type of activations, cache and float weights. fp32 decomposes attention.",
            choices=("fp16", "bf16", "fp32"),
        ),
    ] = "fp16"
    kv: Annotated[
        str,
        Option(
            "A cache that grows, or one of --max-length tokens that is updated in place, as servers want it.",
            choices=("concat", "in-place"),
        ),
    ] = "concat"
    quantize: Annotated[
        str | None,
        Option(
            "int8: weights and activations, by what DIR/onnx-int8 decided; the others: weights alone, w8 and "
            "w4 as in DIR/onnx-w8 or onnx-w4 where that is, fp8 for sm89 and newer. [none]",
            choices=SCHEMES,
        ),
    ] = None


@recipe
class Lengths:
    """Sizes that an engine takes and is tuned for; None: a default within the limits of graph and model."""

    max_batch: Annotated[int, Option("Maximum batch size. With 1 the engine stores fp16 linears twice.")] = 4
    opt_batch: Annotated[int, Option("Batch size to tune for.")] = 1
    max_length: Annotated[
        int | None, Option("Maximum tokens of prompt and answer. [2048, or the context]")
    ] = None
    opt_prompt: Annotated[int | None, Option("Prompt tokens to tune prefill for. [128]")] = None
    opt_length: Annotated[int | None, Option("Sequence tokens to tune decode for. [512]")] = None


@recipe
class EngineBuild:
    """Settings of the builder."""

    runtime: Annotated[
        str,
        Option(
            "What runs the engine: tensorrt-rtx, built without a GPU, for GPUs named by --target; or "
            "tensorrt, for the GPU of this machine.",
            choices=engine_runtimes,
            flag="--engine",
        ),
    ] = DEFAULT_ENGINE
    target: Annotated[
        str | None,
        Option(
            "GPU architectures of an RTX engine, separated by commas; sm75 too. [sm80,sm86,sm89,sm120,sm121]"
        ),
    ] = None
    workspace_bytes: Annotated[
        int | None,
        Option("Maximum workspace per layer, for example 2GiB.", flag="--workspace", size=True),
    ] = None
    weight_streaming: Annotated[bool, Option("Let the engine keep weights on the host at run time.")] = False
    strip_weights: Annotated[bool, Option("Leave the weights out; refit the engine before use.")] = False
    hardware_compatible: Annotated[bool, Option("tensorrt: run on newer GPUs too (Ampere and later).")] = (
        False
    )
    version_compatible: Annotated[bool, Option("tensorrt: run in later versions too.")] = False
    timing_cache: Annotated[Path | None, Option("tensorrt: reuse and extend this file.")] = None
    name: Annotated[
        str | None, Option("Engine name. [derived from its options, for example pruned-int8-in-place]")
    ] = None
