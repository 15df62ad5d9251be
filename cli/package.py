"""``nirvana-deploy package OUT``: what other programs load, from a finished folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nirvana_deploy.base.units import format_bytes
from nirvana_deploy.package.recipe import Package

from .arguments import OUTPUT_OR_MODEL
from .common import TerminalProgress, echo, echo_json, echo_table
from .options import ShownOption, json_option, recipe_options, taken, typed


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
    show_default="OUT/gguf/NAME-TYPE.gguf, or OUT/ and the name of the option; no default for a part of OUT",
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
    """Package OUT, an output folder, for llama.cpp, Triton, openvino-genai, or with a draft.

    --gguf also takes a checkpoint folder; --triton, --openvino and --speculative an ONNX folder.

    --speculative puts a model and a pruned one, its draft, into one folder: the draft proposes tokens, and
    the model checks them in one pass. Output stays the model's own, which twenty prompts prove; how much
    faster it is with 1 to 6 draft tokens is measured, and the fastest is kept. Both have to be exported with
    --flavor gqa.

    \b
    Examples:
      nirvana-deploy package smollm2-s0.4 --gguf --type q8_0
      nirvana-deploy package smollm2-s0.4 --triton --out repository
      nirvana-deploy package smollm2-s0.4/onnx-int8 --openvino --out for-openvino
      nirvana-deploy package smollm2-s0.4 --triton --engine sm89=l4.engine --engine sm86=a10.engine
      nirvana-deploy package t5-s0.3 --triton --engine t5-s0.3/engine/pruned-decoder.engine
      nirvana-deploy package smollm2-s0.4 --speculative --target dense --draft pruned-w4
    """
    given_options = typed(options)
    recipe = taken(Package, options)
    if [recipe.gguf, recipe.triton, recipe.openvino, recipe.speculative].count(True) != 1:
        raise click.UsageError("Pass one of --gguf, --triton, --openvino and --speculative.")
    if recipe.engines and not recipe.triton:
        raise click.UsageError("--engine goes with --triton.")
    if "weight_type" in given_options and not recipe.gguf:
        raise click.UsageError("--type goes with --gguf.")
    if "name" in given_options and not recipe.triton:
        raise click.UsageError("--name goes with --triton.")
    of_pair = {
        "--target": recipe.target_model,
        "--draft": recipe.draft_model,
        "--draft-tokens": recipe.draft_tokens,
        "--threads": recipe.threads,
    }
    if not recipe.speculative and (given := [name for name, value in of_pair.items() if value is not None]):
        raise click.UsageError(f"{given[0]} goes with --speculative.")
    if recipe.gguf:
        _gguf(out, target, recipe, force=force, as_json=as_json)
    elif recipe.triton:
        _triton(out, target, recipe, force=force, as_json=as_json)
    elif recipe.openvino:
        _openvino(out, target, force=force, as_json=as_json)
    else:
        _speculative(out, target, recipe, force=force, as_json=as_json)


def _gguf(out: Path, target: Path | None, recipe: Package, *, force: bool, as_json: bool) -> None:
    from nirvana_deploy.package import stage as packaging

    file = packaging.package_gguf(
        out, target, weight_type=recipe.weight_type, force=force, progress=TerminalProgress()
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
    _say_how_to_publish(file.path)


def _triton(out: Path, target: Path | None, recipe: Package, *, force: bool, as_json: bool) -> None:
    from nirvana_deploy.package import stage as packaging

    progress = TerminalProgress()
    if recipe.engines:
        repository = packaging.package_engines(
            recipe.engines, out, target, name=recipe.name, force=force, progress=progress
        )
    else:
        repository = packaging.package_triton(out, target, name=recipe.name, force=force, progress=progress)
    if as_json:
        echo_json({"out": str(repository.path), "models": list(repository.models)})
        return
    echo(f"{repository.path}: {', '.join(repository.models)}")
    echo(f"Serve it: tritonserver --model-repository {repository.path}")


def _openvino(out: Path, target: Path | None, *, force: bool, as_json: bool) -> None:
    from nirvana_deploy.pipeline.alone.packages import package_openvino

    written = package_openvino(out, target, force=force, progress=TerminalProgress())
    if as_json:
        echo_json({"out": str(written.path), "size_bytes": written.size_bytes})
        return
    echo(f"{written.path}: {format_bytes(written.size_bytes)} for openvino-genai")
    echo(f"Run it: openvino_genai.LLMPipeline({str(written.path)!r}, 'CPU').generate('Once')")
    _say_how_to_publish(written.path)


def _speculative(out: Path, place: Path | None, recipe: Package, *, force: bool, as_json: bool) -> None:
    from nirvana_deploy.pipeline.alone.packages import package_speculative

    made = package_speculative(
        out,
        place,
        target=recipe.target_model,
        draft=recipe.draft_model,
        draft_tokens=recipe.draft_tokens,
        threads=recipe.threads,
        force=force,
        progress=TerminalProgress(),
    )
    if as_json:
        echo_json({"out": str(made.path), **made.record})
        return
    show_speculation(made.record)
    echo(f"Package: {made.path}")
    _say_how_to_publish(made.path)


def _say_how_to_publish(made: Path) -> None:
    from nirvana_deploy.report.snippets import upload_command

    echo(f"Publish it: {upload_command(str(made), is_file=made.is_file())}")


def show_speculation(record: dict[str, Any]) -> None:
    """Print what a draft gains."""
    from nirvana_deploy.report.pages import speculative

    echo_table(speculative.HEADERS, speculative.rows(record))
    for sentence in speculative.says(record):
        echo(sentence)
