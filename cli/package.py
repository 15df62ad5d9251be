"""``nirvana-deploy package OUT``: what other programs load, from a finished folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nirvana_deploy.base.units import format_bytes
from nirvana_deploy.package.recipe import Package

from .arguments import OUTPUT_OR_MODEL
from .common import TerminalProgress, echo, echo_json
from .options import ShownOption, json_option, recipe_options, taken


@click.command("package")
@click.argument("out", metavar="OUT", type=OUTPUT_OR_MODEL)
@recipe_options(Package)
@click.option(
    "--out",
    "target",
    type=click.Path(path_type=Path),
    default=None,
    help="What to write.",
    cls=ShownOption,
    show_default="OUT/gguf/NAME-TYPE.gguf, OUT/triton, OUT/openvino; no default for a part of OUT alone",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
@json_option
def package(
    out: Path,
    target: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Package OUT, an output folder, for llama.cpp, Triton or openvino-genai.

    --gguf also takes a checkpoint folder, --triton and --openvino an ONNX folder.

    \b
    Examples:
      nirvana-deploy package smollm2-s0.4 --gguf --type q8_0
      nirvana-deploy package smollm2-s0.4 --triton --out repository
      nirvana-deploy package smollm2-s0.4/onnx-int8 --openvino --out for-openvino
      nirvana-deploy package smollm2-s0.4 --triton --engine sm89=l4.engine --engine sm86=a10.engine
      nirvana-deploy package t5-s0.3 --triton --engine t5-s0.3/engine/pruned-decoder.engine
    """
    recipe = taken(Package, options)
    if [recipe.gguf, recipe.triton, recipe.openvino].count(True) != 1:
        raise click.UsageError("Pass one of --gguf, --triton and --openvino.")
    if recipe.engines and not recipe.triton:
        raise click.UsageError("--engine goes with --triton.")
    from nirvana_deploy.package import stage as packaging

    progress = TerminalProgress()
    if recipe.gguf:
        file = packaging.package_gguf(
            out, target, weight_type=recipe.weight_type, force=force, progress=progress
        )
        if as_json:
            echo_json(packaging.gguf_record(file))
            return
        echo(f"{file.path}: {file.architecture}, {format_bytes(file.size_bytes)} of {recipe.weight_type}")
        if file.left_in_f16:
            echo(
                f"{file.left_in_f16} matrices stay f16: their rows are no multiple of 32. "
                "Prune with --round-to 32."
            )
    elif recipe.openvino:
        written = packaging.package_openvino(out, target, force=force, progress=progress)
        if as_json:
            echo_json({"out": str(written.path), "size_bytes": written.size_bytes})
            return
        echo(f"{written.path}: {format_bytes(written.size_bytes)} for openvino-genai")
        echo(f"Run it: openvino_genai.LLMPipeline({str(written.path)!r}, 'CPU').generate('Once')")
    else:
        if recipe.engines:
            repository = packaging.package_engines(
                recipe.engines, out, target, name=recipe.name, force=force, progress=progress
            )
        else:
            repository = packaging.package_triton(
                out, target, name=recipe.name, force=force, progress=progress
            )
        if as_json:
            echo_json({"out": str(repository.path), "models": list(repository.models)})
            return
        echo(f"{repository.path}: {', '.join(repository.models)}")
        echo(f"Serve it: tritonserver --model-repository {repository.path}")
