"""``nirvana-deploy generate PATH``: text from any model that this tool made, in any runtime."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from nirvana_deploy.runtime.recipe import Generation, Place

from .arguments import OUTPUT_MODEL_OR_ENGINE
from .common import TerminalProgress, echo, echo_json, echo_piece
from .options import json_option, recipe_options, taken


@click.command("generate")
@click.argument("path", type=OUTPUT_MODEL_OR_ENGINE)
@recipe_options(Generation, Place)
@json_option
def generate(path: Path, as_json: bool, **options: Any) -> None:
    """Stream an answer from PATH: an output folder, an ONNX folder, a checkpoint or an engine file. Greedy.

    \b
    Examples:
      nirvana-deploy generate smollm2-s0.4 --prompt "The capital of France is"
      nirvana-deploy generate smollm2-s0.4 --variant dense-w4 --prompt "The capital of France is"
      nirvana-deploy generate smollm2-s0.4/engine/pruned.engine --prompt "Hello" --chat
    """
    from nirvana_deploy.pipeline.alone.text import generate_text

    place = taken(Place, options)
    on_text = None if as_json else echo_piece
    answer = generate_text(path, place=place, on_text=on_text, progress=TerminalProgress(), **options)
    if as_json:
        echo_json(asdict(answer))
        return
    echo()
    if answer.no_room:
        echo("The answer ends here: the model's context, or the cache of its graph, is full.", err=True)
    speed = f", {1e3 / answer.tpot_ms:.1f} tokens/s" if answer.tpot_ms else ""
    echo(
        f"{answer.new_tokens} tokens after {answer.prompt_tokens}, TTFT {answer.ttft_ms:.0f} ms{speed} "
        f"({answer.runtime})",
        err=True,
    )
