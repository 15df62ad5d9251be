"""``nirvana-deploy generate PATH``: text from any model that this tool made, in any runtime."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from .common import echo_json, json_option, runtime_option, threads_option


@click.command("generate")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--prompt", required=True, help="Text to continue.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Longest answer.",
)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=None,
    help="Folder with the tokenizer. [the model's own, or the one of its output folder]",
)
@runtime_option
@threads_option
@json_option
def generate(
    path: Path,
    prompt: str,
    max_new_tokens: int,
    chat: bool,
    tokenizer: Path | None,
    runtime: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Stream an answer from PATH: an output folder, an ONNX folder or an engine file. Greedy.

    \b
    Example:
      nirvana-deploy generate smollm2-s0.4 --prompt "The capital of France is"
      nirvana-deploy generate smollm2-s0.4/engine/pruned.engine --prompt "Hello" --chat
    """
    from nirvana_deploy.runtime.registry import open_runner
    from nirvana_deploy.runtime.text import load_text_side, model_in, stream_text, tokenizer_folder

    model = model_in(path)
    text_side, stops = load_text_side(tokenizer_folder(model, given=tokenizer))
    with open_runner(model, runtime=runtime, threads=threads) as runner:
        answer = stream_text(
            runner,
            text_side,
            prompt,
            max_new_tokens=max_new_tokens,
            stops=stops,
            chat=chat,
            on_text=None if as_json else lambda text: click.echo(text, nl=False),
        )
    if as_json:
        echo_json({"runtime": runner.runtime, **asdict(answer)})
        return
    click.echo()
    speed = f", {1e3 / answer.tpot_ms:.1f} tokens/s" if answer.tpot_ms else ""
    click.echo(
        f"{answer.new_tokens} tokens after {answer.prompt_tokens}, TTFT {answer.ttft_ms:.0f} ms{speed} "
        f"({runner.runtime})",
        err=True,
    )
