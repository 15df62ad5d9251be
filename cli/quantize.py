"""``nirvana-deploy quantize DIR``: a quantized ONNX folder from a float one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nirvana_deploy.base.recipe import names_of
from nirvana_deploy.base.units import format_bytes
from nirvana_deploy.quantize.recipe import CalibrationText, Quantization
from nirvana_deploy.quantize.schemes import onnx_scheme

from .arguments import OUTPUT_OR_ONNX
from .common import TerminalProgress, echo, echo_json
from .options import ShownOption, json_option, recipe_options, taken, typed


@click.command("quantize")
@click.argument("folder", metavar="DIR", type=OUTPUT_OR_ONNX)
@recipe_options(Quantization, CalibrationText)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="ONNX folder to write.",
    cls=ShownOption,
    show_default="DIR/onnx-<scheme> in an output folder",
)
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@json_option
def quantize(
    folder: Path,
    out: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize DIR, an output folder or an ONNX folder of this tool, and prove what runs in integers.

    \b
    Examples:
      nirvana-deploy quantize smollm2-s0.4 --scheme int8
      nirvana-deploy quantize my-onnx --scheme w4 --block-size 64 --out my-onnx-w4
      nirvana-deploy quantize my-onnx --scheme int8 --calib handbook.txt --out my-onnx-int8
    """
    from nirvana_deploy.base.ownership.marker import require_free
    from nirvana_deploy.output.layout import MANIFEST, ONNX
    from nirvana_deploy.pipeline.alone.onnx import quantize_onnx_folder
    from nirvana_deploy.pipeline.folder import quantize_folder
    from nirvana_deploy.quantize.coverage import Coverage

    progress = TerminalProgress()
    _refuse_ignored(options)
    recipe, text = taken(Quantization, options), taken(CalibrationText, options)
    whole_run = (folder / MANIFEST).is_file()
    if whole_run and (out or text.calib):
        raise click.UsageError(
            "DIR is an output folder: it has its own place and calibration windows. "
            "With --out or --calib, name its ONNX folder DIR/onnx."
        )
    if out is None and not whole_run:
        raise click.UsageError("DIR is an ONNX folder, not an output folder: say where to write with --out.")
    target = out or folder / f"onnx-{recipe.scheme}"
    if whole_run:
        require_free(target, force=force, reads=[folder / ONNX])
        record: dict[str, Any] = quantize_folder(folder, recipe, progress=progress)
    else:
        record = quantize_onnx_folder(folder, target, recipe, text, force=force, progress=progress).record
    if as_json:
        echo_json({"out": str(target), **record})
        return
    for line in _sensitivity_lines(record.get("sensitivity")):
        echo(line)
    for name, reason in record.get("int8", {}).get("kept_float", {}).items():
        echo(f"in float: {name} ({reason})")
    echo(f"{target}: {Coverage(**record['coverage']).line}")
    echo(
        f"{format_bytes(record['weights_bytes'])} of weights, {format_bytes(record['float_bytes'])} in float"
    )


def _refuse_ignored(options: dict[str, Any]) -> None:
    """Raise UsageError for an option that was typed and that the scheme does not read."""
    scheme, given = onnx_scheme(options["scheme"]), typed(options)
    for option in click.get_current_context().command.params:
        name = option.name or ""
        if name in given and name in names_of(Quantization) and name not in {"scheme", *scheme.options}:
            raise click.UsageError(f"{option.opts[0]} has no effect on {scheme.name}: leave it out.")
        if name in given and name in names_of(CalibrationText) and name != "calib" and not options["calib"]:
            raise click.UsageError(f"{option.opts[0]} is about windows of --calib, which is missing.")


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
