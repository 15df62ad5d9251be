"""``nirvana-deploy package OUT``: what other programs load, from a finished folder."""

from __future__ import annotations

from pathlib import Path

import click

from .common import TerminalProgress, echo_json, json_option


@click.command("package")
@click.argument("out", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--gguf", "as_gguf", is_flag=True, help="One GGUF file for llama.cpp, from the checkpoint.")
@click.option("--triton", "as_triton", is_flag=True, help="A Triton model repository, from the ONNX folder.")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="[TARGET=]FILE",
    help="With --triton: serve this TensorRT engine instead, for example sm89=l4.engine. Repeatable. Of an "
    "encoder-decoder the decoder's, alone: text in, text out.",
)
@click.option(
    "--out",
    "target",
    type=click.Path(path_type=Path),
    default=None,
    help="What to write. [OUT/gguf/NAME-TYPE.gguf, OUT/triton]",
)
@click.option(
    "--type",
    "weight_type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    default="f16",
    show_default=True,
    help="Weights of the GGUF file.",
)
@click.option("--name", default=None, help="Name of the model in the repository. [of the folder]")
@click.option("--force", is_flag=True, help="Replace what is there.")
@json_option
def package(
    out: Path,
    as_gguf: bool,
    as_triton: bool,
    engines: tuple[str, ...],
    target: Path | None,
    weight_type: str,
    name: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Package OUT, an output folder, for llama.cpp or for Triton.

    --gguf also takes a checkpoint folder, --triton an ONNX folder.

    \b
    Example:
      nirvana-deploy package smollm2-s0.4 --gguf --type q8_0
      nirvana-deploy package smollm2-s0.4 --triton --out repository
      nirvana-deploy package smollm2-s0.4 --triton --engine sm89=l4.engine --engine sm86=a10.engine
      nirvana-deploy package t5-s0.3 --triton --engine t5-s0.3/engine/pruned-decoder.engine
    """
    if as_gguf == as_triton:
        raise click.UsageError("Pass one of --gguf and --triton.")
    if engines and not as_triton:
        raise click.UsageError("--engine goes with --triton.")
    from nirvana_deploy.package import stage as packaging

    progress = TerminalProgress()
    if as_gguf:
        file = packaging.package_gguf(out, target, weight_type=weight_type, force=force, progress=progress)
        if as_json:
            echo_json(packaging.gguf_record(file))
            return
        click.echo(f"{file.path}: {file.architecture}, {file.size_bytes / 1e6:,.1f} MB of {weight_type}")
        if file.left_in_f16:
            click.echo(f"{file.left_in_f16} matrices stay f16: their rows are no multiple of 32.")
    else:
        if engines:
            repository = packaging.package_engines(
                engines, out, target, name=name, force=force, progress=progress
            )
        else:
            repository = packaging.package_triton(out, target, name=name, force=force, progress=progress)
        if as_json:
            echo_json({"out": str(repository.path), "models": list(repository.models)})
            return
        click.echo(f"{repository.path}: {', '.join(repository.models)}")
        click.echo(f"Serve it: tritonserver --model-repository {repository.path}")
