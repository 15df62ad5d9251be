"""``nirvana-deploy build-engine DIR``: a TensorRT engine from an output folder or an ONNX folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import TerminalProgress, echo_json, json_option
from .engine_page import engine_lines

_SIZES = {"k": 10, "m": 20, "g": 30}


class _Bytes(click.ParamType[Any]):
    """A number of bytes, with an optional K, M or G (binary)."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse what the user typed."""
        text = str(value).lower().removesuffix("ib").removesuffix("b")
        shift = _SIZES.get(text[-1:], 0)
        try:
            return int(float(text[:-1] if shift else text) * (1 << shift))
        except ValueError:
            self.fail(f"{value!r} is no size; 2G, 512M and 1048576 are.", param, ctx)


@click.command("build-engine")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--engine",
    "runtime",
    type=click.Choice(["tensorrt-rtx", "tensorrt"]),
    default="tensorrt-rtx",
    show_default=True,
    help="tensorrt-rtx builds without a GPU, for GPUs named by --target; tensorrt for this machine's GPU.",
)
@click.option("--variant", type=click.Choice(["pruned", "dense"]), help="Of an output folder. [pruned]")
@click.option(
    "--dtype",
    type=click.Choice(["fp16", "bf16", "fp32"]),
    help="Of activations, cache and float weights. fp32 decomposes attention. [fp16]",
)
@click.option(
    "--kv",
    type=click.Choice(["concat", "in-place"]),
    help="A cache that grows, or one of --max-length tokens that is updated in place, as servers want it. "
    "[concat]",
)
@click.option(
    "--quantize",
    type=click.Choice(["int8", "w8", "w4", "fp8"]),
    help="int8: weights and activations, by what DIR/onnx-int8 decided; the others: weights alone, w8 and w4 "
    "as in DIR/onnx-w8 or onnx-w4 where that is, fp8 for sm89 and newer. [none]",
)
@click.option(
    "--target",
    help="GPU architectures of an RTX engine, with commas; sm75 too. [sm80,sm86,sm89,sm120,sm121]",
)
@click.option(
    "--max-batch",
    type=int,
    default=4,
    show_default=True,
    help="Largest batch. With 1 the engine stores fp16 linears twice.",
)
@click.option("--opt-batch", type=int, default=1, show_default=True, help="Batch that is tuned for.")
@click.option("--max-length", type=int, help="Longest sequence, prompt and answer. [2048, or the context]")
@click.option("--opt-prompt", type=int, help="Tokens of a prompt that prefill is tuned for. [128]")
@click.option("--opt-length", type=int, help="Tokens of a sequence that decode is tuned for. [512]")
@click.option("--workspace", type=_Bytes(), help="Most memory that a layer may use for itself, as 2G.")
@click.option("--weight-streaming", is_flag=True, help="Let the engine keep weights on the host at run time.")
@click.option("--strip-weights", is_flag=True, help="Leave the weights out; refit the engine before use.")
@click.option(
    "--hardware-compatible", is_flag=True, help="tensorrt: run on newer GPUs too (Ampere and later)."
)
@click.option("--version-compatible", is_flag=True, help="tensorrt: run in later versions too.")
@click.option("--timing-cache", type=click.Path(path_type=Path), help="tensorrt: reuse and extend this file.")
@click.option("--calib-cache", hidden=True, help="Gone from TensorRT 11.")
@click.option("--name", help="Of the engine. [what it is: pruned, pruned-int8-in-place, ...]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to. [DIR/engine]")
@click.option("--force", is_flag=True, help="Replace an existing engine.")
@json_option
def build_engine(
    folder: Path,
    runtime: str,
    target: str | None,
    max_batch: int,
    opt_batch: int,
    max_length: int | None,
    opt_prompt: int | None,
    opt_length: int | None,
    workspace: int | None,
    weight_streaming: bool,
    strip_weights: bool,
    hardware_compatible: bool,
    version_compatible: bool,
    timing_cache: Path | None,
    calib_cache: str | None,
    name: str | None,
    out: Path | None,
    force: bool,
    as_json: bool,
    **of_output: str | None,
) -> None:
    """Build a TensorRT engine from DIR, an output folder (its checkpoint is exported) or an ONNX folder.

    The engine lies in DIR/engine with its log and a JSON that says what it is; ``inspect`` shows it.

    \b
    Examples:
      nirvana-deploy build-engine smollm2-s0.4
      nirvana-deploy build-engine smollm2-s0.4 --kv in-place --quantize w4 --target sm86,sm89
      nirvana-deploy build-engine my-onnx-fp16 --max-batch 1
    """
    from nirvana_deploy.base.errors import NirvanaError
    from nirvana_deploy.engine import stage as engines
    from nirvana_deploy.engine.profile import Lengths
    from nirvana_deploy.engine.targets import BuilderOptions
    from nirvana_deploy.output.layout import ENGINES
    from nirvana_deploy.output.run import MANIFEST
    from nirvana_deploy.runtime.tensorrt.record import ENGINE_SUFFIX, read_engine_record

    if calib_cache is not None:
        raise NirvanaError(
            "There is no calibration cache: TensorRT 11 removed calibration, and with it implicit int8. "
            "Ranges are now written into the graph as Q/DQ.",
            hint="nirvana-deploy quantize DIR --scheme int8, then build-engine DIR --quantize int8",
        )
    options = BuilderOptions(
        runtime=runtime,
        targets=tuple(filter(None, (part.strip() for part in target.split(",")))) if target else None,
        workspace_bytes=workspace,
        weight_streaming=weight_streaming,
        strip_weights=strip_weights,
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
        timing_cache=timing_cache,
    )
    lengths = Lengths(
        max_batch=max_batch,
        opt_batch=opt_batch,
        max_length=max_length,
        opt_prompt=opt_prompt,
        opt_length=opt_length,
    )
    given = {option: value for option, value in of_output.items() if value is not None}
    is_output, progress = (folder / MANIFEST).is_file(), TerminalProgress()
    if given and not is_output:
        raise NirvanaError(
            f"{folder} is no output folder: its ONNX file already settles --{', --'.join(given)}.",
            hint="Give the output folder of prune-export, or leave them out.",
        )
    if is_output and out is not None:
        raise NirvanaError(
            "The engine of an output folder lies in it.", hint="Leave out --out; --name names it."
        )
    where = out or folder / ENGINES
    named = name or (folder.resolve().name if not is_output else None)
    if is_output and named is None:
        named = engines.engine_name(
            given.get("variant") or "pruned",
            dtype=given.get("dtype") or "fp16",
            kv=given.get("kv") or "concat",
            quantize=given.get("quantize"),
            runtime=runtime,
        )
    existing = sorted(where.glob(f"{named}{ENGINE_SUFFIX}")) + sorted(
        where.glob(f"{named}-*coder{ENGINE_SUFFIX}")
    )
    if existing and not force:
        raise NirvanaError(
            f"{existing[0]} exists already.", hint="Pass --force to replace it, or --name NAME."
        )
    if is_output:
        paths = engines.engine_from_output(
            folder, name=named, lengths=lengths, options=options, progress=progress, **given
        )
    else:
        paths = engines.engines_from_onnx_folder(
            folder, where, name=named, lengths=lengths, options=options, progress=progress
        )
    records = [read_engine_record(path, check_bytes=False) for path in paths]
    if as_json:
        echo_json({"engines": [{"path": str(p), **r.to_json()} for p, r in zip(paths, records, strict=True)]})
        return
    for path, record in zip(paths, records, strict=True):
        click.echo("\n".join(engine_lines(path, record)))
