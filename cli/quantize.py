"""``nirvana-deploy quantize DIR``: a quantized ONNX folder from a float one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import TerminalProgress, echo_json, json_option


class _Smooth(click.ParamType[Any]):
    """A number, or one of two words."""

    name = "float|auto|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse what the user typed."""
        if value in ("auto", "none"):
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'auto' or 'none'.", param, ctx)


@click.command("quantize")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--scheme", required=True, help="int8: weights and activations; w8, w4: weights alone.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="ONNX folder to write. [DIR/onnx-<scheme> in an output folder]",
)
@click.option(
    "--calib",
    default=None,
    help="Calibration text, as prune-export takes it. [the windows that an output folder was pruned with]",
)
@click.option(
    "--num-sequences",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Windows drawn from --calib.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens a window of --calib.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draw.")
@click.option(
    "--smooth",
    type=_Smooth(),
    default=None,
    help="SmoothQuant's alpha, folded into the weights; auto chooses it by KL. [auto]",
)
@click.option(
    "--ranges",
    default="minmax",
    show_default=True,
    help="How far activations are quantized: minmax, percentile, entropy, mse.",
)
@click.option(
    "--keep-fp",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Leave the linears of largest KL in float, so many.",
)
@click.option(
    "--sensitivity", is_flag=True, help="Measure, print and draw the KL of each layer alone in int8."
)
@click.option(
    "--block-size",
    type=int,
    default=32,
    show_default=True,
    help="w4: inputs that share a scale: 16, 32, 64, 128 or 256. Larger blocks are smaller files and lose "
    "more: in a float32 graph a weight takes 5 bits at 32, 4.5 at 64, 4.25 at 128.",
)
@click.option(
    "--rounding",
    default=None,
    help="w8, w4: plain, search (scales of least error) or gptq (fitted to the calibration windows). "
    "[gptq with calibration windows, else search]",
)
@click.option(
    "--writing",
    default="ort",
    show_default=True,
    help="w8, w4: ort (MatMulNBits) or tensorrt (DequantizeLinear), the same numbers.",
)
@click.option(
    "--head",
    is_flag=True,
    help="Quantize lm_head as well, and of w8 and w4 (written ort) the embedding: a large part of a small "
    "model.",
)
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@json_option
def quantize(
    folder: Path,
    scheme: str,
    out: Path | None,
    calib: str | None,
    num_sequences: int,
    seq_len: int,
    seed: int,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize DIR, an output folder or an ONNX folder of this tool, and prove what runs in integers.

    \b
    Example:
      nirvana-deploy quantize smollm2-s0.4 --scheme int8
      nirvana-deploy quantize my-onnx --scheme w4 --block-size 64 --out my-onnx-w4
      nirvana-deploy quantize my-onnx --scheme int8 --calib handbook.txt --out my-onnx-int8
    """
    from nirvana_deploy import pipeline
    from nirvana_deploy.base.errors import NirvanaError
    from nirvana_deploy.output.run import MANIFEST
    from nirvana_deploy.quantize.coverage import Coverage
    from nirvana_deploy.quantize.quantize import quantize_onnx
    from nirvana_deploy.report.sensitivity import write_sensitivity

    progress = TerminalProgress()
    whole_run = (folder / MANIFEST).is_file()
    if whole_run and (out or calib):
        raise click.UsageError(
            "DIR is an output folder: it has its own place and calibration windows. "
            "With --out or --calib, name its ONNX folder DIR/onnx."
        )
    if out is None and not whole_run:
        raise click.UsageError("DIR is an ONNX folder, not an output folder: say where to write with --out.")
    target = out or folder / f"onnx-{scheme}"
    if target.exists() and not force:
        raise NirvanaError(f"{target} exists already.", hint="Pass --force to replace it.")
    if whole_run:
        record = pipeline.quantize_folder(folder, scheme=scheme, progress=progress, **options)
    else:
        windows = {} if calib is None else _drawn(folder, calib, num_sequences, seq_len, seed, progress)
        record = quantize_onnx(folder, target, scheme=scheme, progress=progress, **windows, **options).record
        write_sensitivity(target, record)
    if as_json:
        echo_json({"out": str(target), **record})
        return
    for line in _sensitivity_lines(record.get("sensitivity")):
        click.echo(line)
    for name, reason in record.get("int8", {}).get("kept_float", {}).items():
        click.echo(f"in float: {name} ({reason})")
    size, float_size = record["weights_bytes"] / 1e6, record["float_bytes"] / 1e6
    click.echo(f"{target}: {Coverage(**record['coverage']).line}")
    click.echo(f"{size:,.1f} MB of weights, {float_size:,.1f} MB in float")


def _drawn(
    source: Path, calib: str, num_sequences: int, seq_len: int, seed: int, progress: TerminalProgress
) -> dict[str, Any]:
    """Calibration and held-out windows of a text, by the folder's own tokenizer."""
    from nirvana_deploy.calibrate.windows import calibration_data
    from nirvana_deploy.model.checkpoint import load_tokenizer
    from nirvana_deploy.quantize.graph.linears import open_folder

    open_folder(source)  # what cannot be quantized is refused before any text is read
    data = calibration_data(
        calib,
        load_tokenizer(source),
        num_sequences=num_sequences,
        seq_len=seq_len,
        seed=seed,
        heldout_sequences=8,
        heldout_len=max(seq_len, 2),
        progress=progress,
    )
    return {"calibration": data.calibration.tokens, "heldout": data.heldout.tokens}


def _sensitivity_lines(sensitivity: dict[str, dict[str, float]] | None) -> list[str]:
    """A bar per layer, and the worst linears."""
    if sensitivity is None:
        return []
    layers = sensitivity["layers"]
    largest = max(layers.values(), default=0.0) or 1.0
    bars = [f"layer {name:>4} {kl:9.5f} {'#' * round(40 * kl / largest)}" for name, kl in layers.items()]
    worst = list(sensitivity["linears"].items())[:10]
    return [
        "KL when a layer alone runs in int8, nats:",
        *bars,
        "Worst linears:",
        *(f"{kl:9.5f} {name}" for name, kl in worst),
    ]
