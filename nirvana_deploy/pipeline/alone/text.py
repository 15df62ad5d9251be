"""An answer of any model that this tool made, in any runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nirvana_deploy.runtime.recipe import Generation as Asked
from nirvana_deploy.runtime.recipe import Place
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.text import Generation, load_text_side, model_in, stream_text, tokenizer_folder


def generate_text(
    path: Path | str,
    prompt: str,
    *,
    max_new_tokens: int = Asked.max_new_tokens,
    chat: bool = Asked.chat,
    tokenizer: Path | None = None,
    place: Place | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue ``prompt`` greedily with an output folder, an ONNX folder, a checkpoint or an engine file.

    ``chat`` puts the prompt into the model's chat template; ``tokenizer`` is the folder of one [the model's
    own]; ``on_text`` hears the answer piece by piece. Raises NirvanaError for a folder without model or
    tokenizer, a runtime that is missing or does not take it, and as :func:`stream_text` does.
    """
    asked = Asked(prompt=prompt, max_new_tokens=max_new_tokens, chat=chat, tokenizer=tokenizer)
    place = place or Place()
    model = model_in(Path(path), runtime=place.runtime)
    text_side, stops = load_text_side(tokenizer_folder(model, given=asked.tokenizer))
    with open_runner(model, runtime=place.runtime, threads=place.threads) as runner:
        return stream_text(
            runner,
            text_side,
            asked.prompt,
            max_new_tokens=asked.max_new_tokens,
            stops=stops,
            chat=asked.chat,
            on_text=on_text,
        )
