"""``nirvana-deploy serve PATH``: an HTTP server that OpenAI's clients understand."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from nirvana_deploy.runtime.recipe import Place
from nirvana_deploy.serve.recipe import Serving

from .arguments import OUTPUT_OR_ONNX
from .common import TerminalProgress, echo, echo_json
from .options import json_option, recipe_options, taken


@click.command("serve")
@click.argument("path", type=OUTPUT_OR_ONNX)
@recipe_options(Serving, Place)
@json_option
def serve(path: Path, as_json: bool, **options: Any) -> None:
    """Serve PATH, an output folder or an ONNX folder, over HTTP until Ctrl-C or SIGTERM.

    /v1/chat/completions, /v1/completions and /v1/models answer as OpenAI's API does, in one piece or
    streamed; /health and /metrics (Prometheus) are for whoever runs it. --json prints one object when it
    listens.

    \b
    Examples:
      nirvana-deploy serve smollm2-s0.4
      nirvana-deploy serve smollm2-s0.4 --variant pruned-w4 --port 9000 --slots 8
    """
    from nirvana_deploy.pipeline.alone.serve import serve_folder
    from nirvana_deploy.serve.server import Served

    def say(served: Served) -> None:
        if as_json:
            return echo_json(asdict(served))
        context = f"context {served.context_tokens:,}, " if served.context_tokens else ""
        key = ", a bearer token is asked for" if served.needs_key else ""
        echo(f"{served.model} on {served.url} ({context}{served.slots} slots{key})")

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # a client that went away is no warning
    place = taken(Place, options)
    served = serve_folder(path, Serving(**options), place, on_ready=say, progress=TerminalProgress())
    echo(f"Ended after {served.answered:,} answers.", err=True)
