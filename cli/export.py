"""``nirvana-deploy export MODEL``: an ONNX folder from any checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nirvana_deploy.base.units import format_bytes
from nirvana_deploy.export.recipe import Graph

from .arguments import Model
from .common import TerminalProgress, echo, echo_json
from .options import json_option, recipe_options, taken


@click.command("export")
@click.argument("model", type=Model())
@click.option("--out", type=click.Path(path_type=Path), required=True, help="ONNX folder to write.")
@recipe_options(Graph)
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@json_option
def export(
    model: str,
    out: Path,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Export MODEL, a checkpoint folder (dense or pruned), an alias or a hub id, to ONNX in OUT.

    \b
    Examples:
      nirvana-deploy export smollm2-s0.4/checkpoint --out my-onnx
      nirvana-deploy export smollm2 --out my-onnx-fp16 --dtype fp16 --flavor gqa
      nirvana-deploy export smollm2 --out for-engines --dtype fp16 --flavor static-cache --cache-length 1024
    """
    from nirvana_deploy.pipeline.alone.onnx import export_onnx

    graph = taken(Graph, options)
    exported = export_onnx(model, out, graph, force=force, progress=TerminalProgress())
    if as_json:
        echo_json(
            {
                "out": str(out),
                "dtype": graph.dtype,
                "flavor": graph.flavor,
                "nodes": exported.nodes,
                "weights_bytes": exported.weights_bytes,
            }
        )
    else:
        echo(f"{out}: {exported.nodes} nodes, {format_bytes(exported.weights_bytes)} of weights")
