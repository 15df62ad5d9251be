"""Chat templates of strangers: what transformers writes, or one sentence within the limits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.text import chat
from nirvana_deploy.model.text.chat import users_turn

FAITHFUL = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content | trim }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_the_text_is_that_of_transformers(tokenizer: Any) -> None:
    tokenizer.chat_template = FAITHFUL
    turn = [{"role": "user", "content": " é "}]
    theirs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert users_turn(tokenizer, " é ") == theirs == "<s>[user] é<bot>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'a' * 10 ** 10 }}", "more than 256 MB of memory"),
        ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "more than 256 MB of memory"),
        ("{{ 'a' * 2 ** 21 }}", "writes 2,097,152 characters; the most is 1,048,576"),
        ("{{ raise_exception('no system turn here') }}", "no system turn here"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' of 'list' object is unsafe"),
        ("{% for %}", "Expected an expression"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ range(10 ** 9) }}", "Range too big"),
    ],
)
def test_a_hostile_template_ends_in_a_sentence(tokenizer: Any, template: str, said: str) -> None:
    tokenizer.chat_template = template
    before = psutil.Process().memory_info().rss
    with pytest.raises(NirvanaError, match="The chat template was refused: ") as refused:
        users_turn(tokenizer, "Hi")
    assert said in refused.value.message and "\n" not in refused.value.message
    assert refused.value.hint is not None and "Leave --chat out" in refused.value.hint
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_a_template_without_end_is_ended(tokenizer: Any) -> None:
    rounds = "{% for i in range(99999) %}"
    tokenizer.chat_template = 4 * rounds + 4 * "{% endfor %}"
    started = time.monotonic()
    with pytest.raises(NirvanaError, match="took longer than 5 s of CPU time"):
        users_turn(tokenizer, "Hi")
    assert time.monotonic() - started < 60


def test_a_template_that_only_waits_is_ended(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "WALL_SECONDS", 0.1)
    tokenizer.chat_template = FAITHFUL
    with pytest.raises(NirvanaError, match=r"took longer than 0\.1 s"):
        users_turn(tokenizer, "Hi")


def test_where_the_system_enforces_no_limit_the_parent_does(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "limits_are_enforced", lambda: False)
    tokenizer.chat_template = FAITHFUL
    assert users_turn(tokenizer, "Hi") == "<s>[user] Hi<bot>"
    monkeypatch.setattr(chat, "RESIDENT_BYTES", 1 << 20)
    with pytest.raises(NirvanaError, match="it needs too much memory"):
        users_turn(tokenizer, "Hi")


def test_several_templates_without_a_default_are_a_sentence(tokenizer: Any) -> None:
    tokenizer.chat_template = {"rag": FAITHFUL, "tool_use": FAITHFUL}
    with pytest.raises(NirvanaError, match="No chat template can be chosen"):
        users_turn(tokenizer, "Hi")
