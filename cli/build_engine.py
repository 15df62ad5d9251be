"""``nirvana-deploy build-engine DIR``: a TensorRT engine from an output folder or an ONNX folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nirvana_deploy.base.recipe import fields_of
from nirvana_deploy.engine.recipe import EngineBuild, EngineForm, Lengths

from .arguments import OUTPUT_OR_ONNX
from .common import TerminalProgress, echo, echo_json
from .engine_page import engine_lines
from .options import ShownOption, json_option, recipe_options, taken, typed


@click.command("build-engine")
@click.argument("folder", metavar="DIR", type=OUTPUT_OR_ONNX)
@recipe_options(EngineForm, Lengths, EngineBuild)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to write to.",
    cls=ShownOption,
    show_default="DIR/engine",
)
@click.option("--force", is_flag=True, help="Replace an existing engine.")
@json_option
def build_engine(folder: Path, out: Path | None, force: bool, as_json: bool, **options: Any) -> None:
    """Build a TensorRT engine from DIR, an output folder (its checkpoint is exported) or an ONNX folder.

    The engine lies in DIR/engine with its log and a JSON that says what it is: 'nirvana-deploy inspect' shows
    it.

    \b
    Examples:
      nirvana-deploy build-engine smollm2-s0.4
      nirvana-deploy build-engine smollm2-s0.4 --kv in-place --quantize w4 --target sm86,sm89
      nirvana-deploy build-engine my-onnx-fp16 --max-batch 1
    """
    from nirvana_deploy.base.errors import NirvanaError
    from nirvana_deploy.output.layout import MANIFEST
    from nirvana_deploy.pipeline.folder import build_engines
    from nirvana_deploy.runtime.tensorrt.record import read_engine_record

    given = [field.name for field in fields_of(EngineForm) if field.name in typed(options)]
    form, lengths = taken(EngineForm, options), taken(Lengths, options)
    if given and not (folder / MANIFEST).is_file():
        raise NirvanaError(
            f"{folder} is no output folder: its ONNX file already settles --{', --'.join(given)}.",
            hint="Give the output folder of prune-export, or leave them out.",
        )
    build = taken(EngineBuild, options)
    paths = build_engines(folder, form, lengths, build, out=out, force=force, progress=TerminalProgress())
    records = [read_engine_record(path, check_bytes=False) for path in paths]
    if as_json:
        echo_json({"engines": [{"path": str(p), **r.to_json()} for p, r in zip(paths, records, strict=True)]})
        return
    for path, record in zip(paths, records, strict=True):
        echo("\n".join(engine_lines(path, record)))
