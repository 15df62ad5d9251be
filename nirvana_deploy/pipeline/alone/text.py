"""An answer of any model that this tool made, in any runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.output.layout import MANIFEST
from nirvana_deploy.pipeline.alone.chosen import chosen_variant, refuse_variant
from nirvana_deploy.runtime.recipe import Generation as Asked
from nirvana_deploy.runtime.recipe import Place
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.table import runtime_named
from nirvana_deploy.runtime.text import Generation, load_text_side, model_in, stream_text, tokenizer_folder


def generate_text(
    path: Path | str,
    prompt: str,
    *,
    max_new_tokens: int = Asked.max_new_tokens,
    chat: bool = Asked.chat,
    variant: str | None = None,
    tokenizer: Path | None = None,
    place: Place | None = None,
    on_text: Callable[[str], None] | None = None,
    progress: Progress = SILENT,
) -> Generation:
    """Continue ``prompt`` greedily with an output folder, an ONNX folder, a checkpoint or an engine file.

    Of an output folder ``variant`` answers [the one that its report recommends; where ``place`` names a
    runtime the pruned one, since a recommendation holds for the runtime that was timed]; ``progress`` hears
    which. ``chat`` puts the prompt into the model's chat template; ``tokenizer`` is the folder of one [the
    model's own]; ``on_text`` hears the answer piece by piece. Raises NirvanaError for a folder without model
    or tokenizer, a variant that it does not have, a runtime that is missing or does not take it, and as
    :func:`stream_text` does.
    """
    asked = Asked(
        prompt=prompt, max_new_tokens=max_new_tokens, chat=chat, variant=variant, tokenizer=tokenizer
    )
    place = place or Place()
    model = _model(Path(path), asked.variant, place, progress)
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


def _model(path: Path, variant: str | None, place: Place, progress: Progress) -> Path:
    """What answers."""
    if not (path / MANIFEST).is_file():
        refuse_variant(path, variant)
        return model_in(path, runtime=place.runtime)
    if variant is None and place.runtime is not None:
        return model_in(path, runtime=place.runtime)
    if place.runtime is not None and runtime_named(place.runtime).takes != "onnx":
        raise NirvanaError(
            f"The runtime {place.runtime} runs no ONNX folders, which {variant} is.",
            hint="Leave --runtime or --variant out.",
        )
    return path / chosen_variant(path, variant, progress=progress).folder
