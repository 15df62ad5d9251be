"""Options for quantized models."""

from __future__ import annotations

from typing import Annotated, Literal

from nirvana_deploy.base.recipe import Option, recipe
from nirvana_deploy.calibrate.recipe import Seed, source_names
from nirvana_deploy.quantize.schemes import onnx_schemes


@recipe
class Schemes:
    """Quantized variants of an output folder."""

    quantize: Annotated[
        tuple[str, ...],
        Option(
            "Quantize the pruned model too, on the same calibration set; several separated by commas. "
            "int8: weights and activations; w8, w4: weights alone.",
            choices=onnx_schemes,
            resumable=True,
        ),
    ] = ()
    baseline_quantized: Annotated[
        bool,
        Option(
            "Of each scheme, measure the dense model too: what pruning adds to quantization.",
            flag="--baseline-quantized/--no-baseline-quantized",
            resumable=True,
        ),
    ] = True
    quantize_head: Annotated[
        bool,
        Option("Quantize lm_head as well, and of w8 and w4 the embedding: a large part of a small model."),
    ] = False


@recipe
class Quantization:
    """A single quantized ONNX folder."""

    scheme: Annotated[
        str, Option("int8: weights and activations; w8, w4: weights alone.", metavar="[int8|w8|w4]")
    ]
    smooth: Annotated[
        float | Literal["auto", "none"] | None,
        Option("SmoothQuant's alpha, folded into the weights; auto chooses it by KL. [auto]"),
    ] = None
    ranges: Annotated[
        str, Option("How far activations are quantized.", metavar="[minmax|percentile|entropy|mse]")
    ] = "minmax"
    keep_fp: Annotated[int, Option("Keep the N most sensitive linears in float.", minimum=0)] = 0
    sensitivity: Annotated[bool, Option("Measure, print and draw the KL of each layer alone in int8.")] = (
        False
    )
    block_size: Annotated[
        int,
        Option(
            "w4: inputs that share a scale: 16, 32, 64, 128 or 256. Larger blocks are smaller files and lose "
            "more: in a float32 graph a weight takes 5 bits at 32, 4.5 at 64, 4.25 at 128."
        ),
    ] = 32
    rounding: Annotated[
        str | None,
        Option(
            "w8, w4: plain, search (scales of least error) or gptq (fitted to the calibration windows). "
            "[gptq with calibration windows, else search]",
            metavar="[plain|search|gptq]",
        ),
    ] = None
    writing: Annotated[
        str,
        Option(
            "w8, w4: ort (MatMulNBits) or tensorrt (DequantizeLinear), the same numbers.",
            metavar="[ort|tensorrt]",
        ),
    ] = "ort"
    head: Annotated[
        bool,
        Option(
            "Quantize lm_head as well, and of w8 and w4 (written ort) the embedding: a large part of a small "
            "model."
        ),
    ] = False


@recipe
class CalibrationText:
    """Calibration text for an ONNX folder without its output folder."""

    calib: Annotated[
        str | None,
        Option(
            "Calibration text, as prune-export takes it, or the calibration.safetensors of an output folder: "
            "its windows as they are. [the windows that an output folder was pruned with]",
            suggests=source_names,
        ),
    ] = None
    num_sequences: Annotated[int, Option("Number of windows drawn from --calib.", minimum=1)] = 32
    seq_len: Annotated[int, Option("Tokens per window of --calib.", minimum=1)] = 128
    seed: Seed = 0
