"""``nirvana-deploy export MODEL``: an ONNX folder from any checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from .common import TerminalProgress, echo_json, json_option


@click.command("export")
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="ONNX folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Type of weights, activations, KV cache and logits; norms and angles stay float32.",
)
@click.option(
    "--flavor",
    type=click.Choice(["portable", "gqa", "static-cache"]),
    default="portable",
    show_default=True,
    help="How the KV cache is kept: concatenated (standard operators), by GroupQueryAttention (ONNX Runtime, "
    "onnxruntime-genai), or at a fixed length and updated in place (engines).",
)
@click.option(
    "--cache-length",
    "cache_tokens",
    type=click.IntRange(min=1),
    help="Tokens that the cache of static-cache holds, prompt and answer together.",
)
@click.option(
    "--last-logits",
    is_flag=True,
    help="Logits of the last position only: enough for one prompt, or prompts of one length.",
)
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@json_option
def export(
    model: str,
    out: Path,
    dtype: str,
    flavor: str,
    cache_tokens: int | None,
    last_logits: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Export MODEL, a checkpoint folder (dense or pruned), an alias or a hub id, to ONNX in OUT.

    \b
    Examples:
      nirvana-deploy export smollm2-s0.4/checkpoint --out my-onnx
      nirvana-deploy export smollm2 --out my-onnx-fp16 --dtype fp16 --flavor gqa
      nirvana-deploy export smollm2 --out for-engines --dtype fp16 --flavor static-cache --cache-length 1024
    """
    from nirvana_deploy.base.errors import NirvanaError
    from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
    from nirvana_deploy.model.checkpoint import Checkpoint
    from nirvana_deploy.model.sources import resolve_model

    if out.exists() and not force:
        raise NirvanaError(f"{out} exists already.", hint="Pass --force to replace it, or another --out DIR.")
    progress = TerminalProgress()
    exported = onnx_from_checkpoint(
        Checkpoint.open(resolve_model(model, progress=progress).path),
        out,
        dtype=dtype,
        flavor=flavor,
        cache_tokens=cache_tokens,
        last_logits=last_logits,
        progress=progress,
    )
    if as_json:
        echo_json(
            {
                "out": str(out),
                "dtype": dtype,
                "flavor": flavor,
                "nodes": exported.nodes,
                "weights_bytes": exported.weights_bytes,
            }
        )
    else:
        click.echo(f"{out}: {exported.nodes} nodes, {exported.weights_bytes / 1e6:,.1f} MB of weights")
