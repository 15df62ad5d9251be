"""The model behind the server: its runner, and what it says of text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.model.text.renderer import Renderer
from nirvana_deploy.model.text.stops import sampling_settings
from nirvana_deploy.output.layout import is_seq2seq
from nirvana_deploy.runtime.beside import GENAI_CONFIG, context_tokens
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.runner import Runner
from nirvana_deploy.runtime.text import load_text_side, tokenizer_folder
from nirvana_deploy.serve.sampling import Sampling


@dataclass(frozen=True)
class ServedModel:
    """One model, open."""

    name: str
    runner: Runner
    tokenizer: Any
    """Of transformers."""
    stops: frozenset[int]
    context_tokens: int | None
    sampling: Sampling
    """The settings of its author."""
    renderer: Renderer | None
    """None where its tokenizer has no chat template."""
    created: int
    """Seconds since 1970."""

    def ids_of_text(self, text: str) -> list[int]:
        """A text as the tokenizer reads it, with the special tokens that it adds."""
        return [int(token) for token in self.tokenizer(text)["input_ids"]]

    def ids_of_chat(self, conversation: Sequence[dict[str, str]]) -> list[int]:
        """A conversation in the words of the chat template; raises NirvanaError where that fails."""
        if self.renderer is None:
            raise NirvanaError(
                "This model has no chat template.", hint="Ask for a completion: /v1/completions"
            )
        text = self.renderer.render(conversation)
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]


def require_servable(folder: Path) -> Path:
    """The tokenizer's folder of the ONNX ``folder``; raises NirvanaError for a model that is not served."""
    if is_seq2seq(folder):
        raise NirvanaError(
            f"{folder} holds an encoder-decoder, and only decoders are served.",
            hint=f'nirvana-deploy generate {folder} --prompt "..."',
        )
    return tokenizer_folder(folder)


@contextmanager
def opened(
    folder: Path, *, name: str, runtime: str | None = None, threads: int | None = None
) -> Iterator[ServedModel]:
    """Load the ONNX ``folder``; raises NirvanaError for one that cannot be served."""
    text_side = require_servable(folder)
    tokenizer, stops = load_text_side(text_side)
    renderer = Renderer(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    try:
        if renderer is not None:
            renderer.start()
        with open_runner(folder, runtime=runtime, threads=threads) as runner:
            yield ServedModel(
                name=name,
                runner=runner,
                tokenizer=tokenizer,
                stops=stops,
                context_tokens=_context_tokens(folder, runner),
                sampling=_sampling(settings_of(folder)),
                renderer=renderer,
                created=int(time.time()),
            )
    finally:
        if renderer is not None:
            renderer.close()


def settings_of(folder: Path) -> Mapping[str, Any]:
    """How the model's author samples: by generation_config.json, else by genai_config.json."""
    found = sampling_settings(folder)
    if not found and (folder / GENAI_CONFIG).is_file():
        return dict(read_json(folder / GENAI_CONFIG, dict[str, Any]).get("search") or {})
    return found


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """Greedy unless the settings say otherwise."""
    return Sampling(
        temperature=settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0,
        top_k=settings.get("top_k", 0),
        top_p=settings.get("top_p", 1.0),
        repetition_penalty=settings.get("repetition_penalty", 1.0),
    )


def _context_tokens(folder: Path, runner: Runner) -> int | None:
    """The longest sequence, prompt and answer: by the model's positions, and by a cache of fixed length."""
    said = [
        context_tokens(folder),
        getattr(runner, "context_tokens", None),
        getattr(runner, "max_tokens", None),
    ]
    return min((tokens for tokens in said if tokens is not None), default=None)
