"""A child process that renders conversation after conversation, and is replaced when one takes too much."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.text import renderer as module
from nirvana_deploy.model.text.renderer import Renderer

TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}[{{ message.role }}] {{ message.content | trim }}{% endfor %}"
    "{% if 'dawdle' in messages[0].content %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}{% elif 'grow' in messages[0].content %}"
    "{{ messages[0].content * 10 ** 9 }}{% endif %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
TURNS = [{"role": "system", "content": "x"}, {"role": "user", "content": " é\n"}]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    loaded = AutoTokenizer.from_pretrained(tiny_llama)
    loaded.chat_template = TEMPLATE
    return loaded


@pytest.fixture
def renderer(tokenizer: Any) -> Iterator[Renderer]:
    made = Renderer(tokenizer)
    yield made
    made.close()


def children() -> int:
    return len(psutil.Process().children())


@pytest.mark.integration
def test_texts_follow_though_one_took_too_much(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    theirs = "<s>[system] x[user] é<bot>"  # not asked of transformers: a hostile template stays out of here
    assert renderer.render(TURNS) == theirs
    with pytest.raises(NirvanaError, match="more than 256 MB of memory"):
        renderer.render([{"role": "user", "content": "grow"}])
    with pytest.raises(NirvanaError, match="more than 5 s of CPU time"):
        renderer.render([{"role": "user", "content": "dawdle"}])
    assert renderer.render(TURNS) == theirs
    monkeypatch.setattr(module, "WALL_SECONDS", 0.2)
    with pytest.raises(NirvanaError, match="was refused"):
        renderer.render([{"role": "user", "content": "dawdle"}])
    assert children() <= before + 1
    renderer.close()
    assert children() == before
    with pytest.raises(NirvanaError, match="The server is ending"):
        renderer.render(TURNS)


def test_a_template_that_cannot_be_chosen_is_refused_at_once(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(NirvanaError, match="No chat template can be chosen"):
        Renderer(tokenizer)
