"""What models write: a few prompts, continued greedily. A number says how far off, a sentence says how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from nirvana_deploy.base.progress import Advance
from nirvana_deploy.runtime.runner import NoRoomError, Runner
from nirvana_deploy.runtime.text import prompt_ids, stream_text, text_of
from nirvana_deploy.verify.cases import PROMPTS, Continued

NEW_TOKENS = 24
"""Not more than verification hears."""
Heard = Mapping[str, Continued]
"""By variant, what its ONNX folder says in ONNX Runtime on the CPU."""
Texts = dict[str, tuple[str, ...]]
"""By variant, how it continues each of PROMPTS."""


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


def answers_of(
    opened: Callable[[], Runner],
    known: Continued,
    tokenizer: Any,
    stops: frozenset[int],
    advance: Advance,
) -> tuple[str, ...]:
    """The continuations by a model, which is ``opened`` unless all that it says is ``known``."""
    texts = known_continuations(known, tokenizer, stops=stops)
    if texts is None:
        with opened() as runner:
            return continuations(runner, tokenizer, stops=stops, advance=advance)
    advance(len(PROMPTS))
    return texts


def known_continuations(
    known: Continued, tokenizer: Any, *, stops: frozenset[int] = frozenset()
) -> tuple[str, ...] | None:
    """What :func:`continuations` gives of a model that was heard before; None unless each prompt is known."""
    prompts = [tuple(prompt_ids(tokenizer, prompt)) for prompt in PROMPTS]
    if not known.keys() >= set(prompts):
        return None
    return tuple(
        text_of(tokenizer, known[prompt][:NEW_TOKENS], after=prompt, hidden=stops) for prompt in prompts
    )
