"""What models write: a few prompts, continued greedily. A number says how far off, a sentence says how."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from nirvana_deploy.base.progress import Advance
from nirvana_deploy.runtime.runner import NoRoomError, Runner
from nirvana_deploy.runtime.text import stream_text

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def is_even(number):",
    "Anna had three apples and bought two more. Now she has",
    "A dictionary is a book that",
)
"""A fact, a quantity, code, arithmetic in a story, a definition."""
NEW_TOKENS = 24


def continuations(
    runner: Runner,
    tokenizer: Any,
    *,
    stops: frozenset[int] = frozenset(),
    advance: Advance = lambda steps: None,
) -> tuple[str, ...]:
    """Continue each of PROMPTS by NEW_TOKENS greedy tokens, or up to one of ``stops``.

    ``tokenizer`` is the model's, from transformers. The texts are what it decodes to, unedited; one that ends
    at once, or whose prompt is longer than the model's context, is empty.
    """
    texts = []
    for prompt in PROMPTS:
        texts.append("")
        with suppress(NoRoomError):
            answer = stream_text(runner, tokenizer, prompt, max_new_tokens=NEW_TOKENS, stops=stops)
            texts[-1] = answer.text
        advance(1)
    return tuple(texts)
