"""``nirvana-deploy export MODEL``: an ONNX folder from any checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from .common import TerminalProgress, echo_json, json_option


@click.command("export")
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="ONNX folder to write.")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@json_option
def export(model: str, out: Path, force: bool, as_json: bool) -> None:
    """Export MODEL, a checkpoint folder (dense or pruned), an alias or a hub id, to ONNX in OUT.

    \b
    Example:
      nirvana-deploy export smollm2-s0.4/checkpoint --out my-onnx
    """
    from nirvana_deploy.errors import NirvanaError
    from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
    from nirvana_deploy.model.sources import resolve_model

    if out.exists() and not force:
        raise NirvanaError(f"{out} exists already.", hint="Pass --force to replace it, or another --out DIR.")
    progress = TerminalProgress()
    exported = onnx_from_checkpoint(resolve_model(model, progress=progress).path, out, progress=progress)
    if as_json:
        echo_json({"out": str(out), "nodes": exported.nodes, "weights_bytes": exported.weights_bytes})
    else:
        click.echo(f"{out}: {exported.nodes} nodes, {exported.weights_bytes / 1e6:,.1f} MB of weights")
