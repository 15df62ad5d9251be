"""Options for ONNX graphs."""

from __future__ import annotations

from typing import Annotated

from nirvana_deploy.base.recipe import Option, recipe

DTYPES = ("fp32", "fp16", "bf16")


@recipe
class Export:
    """ONNX graphs of an output folder."""

    dtype: Annotated[
        str, Option("Type of weights, activations and KV cache in the ONNX graphs.", choices=DTYPES)
    ] = "fp32"
    flavor: Annotated[
        str,
        Option(
            "Standard operators, or GroupQueryAttention of ONNX Runtime with a shared KV buffer.",
            choices=("portable", "gqa"),
        ),
    ] = "portable"
    baseline: Annotated[
        bool,
        Option("Export and measure the dense model too.", flag="--baseline/--no-baseline", resumable=True),
    ] = True


@recipe
class Graph:
    """A single ONNX folder."""

    dtype: Annotated[
        str,
        Option(
            "Type of weights, activations, KV cache and logits; norms and angles stay float32.",
            choices=DTYPES,
        ),
    ] = "fp32"
    flavor: Annotated[
        str,
        Option(
            "How the KV cache is kept: concatenated (standard operators), by GroupQueryAttention (ONNX "
            "Runtime, onnxruntime-genai), or at a fixed length and updated in place (engines).",
            choices=("portable", "gqa", "static-cache"),
        ),
    ] = "portable"
    cache_tokens: Annotated[
        int | None,
        Option(
            "Cache length of static-cache: tokens of prompt and answer together.",
            minimum=1,
            flag="--cache-length",
        ),
    ] = None
    last_logits: Annotated[
        bool,
        Option("Logits of the last position only: enough for one prompt, or prompts of one length."),
    ] = False
