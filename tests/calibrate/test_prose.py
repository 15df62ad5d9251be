"""``prose``: the text that comes with the package."""

from __future__ import annotations

from importlib import resources

import pytest

import nirvana_deploy.calib_sets as calib_sets
from nirvana_deploy.calibrate.texts import known_sources, read_source
from nirvana_deploy.verify import cases

pytestmark = pytest.mark.unit
_DOCUMENTS = calib_sets.prose()


def test_it_is_a_source_of_many_kinds_by_turns() -> None:
    assert "prose" in known_sources() and read_source("prose").documents == _DOCUMENTS
    kinds = [file.name for file in (resources.files(calib_sets) / "prose").iterdir()]
    assert len(kinds) >= 8 and len(_DOCUMENTS) >= 15 * len(kinds)
    firsts = _DOCUMENTS[: len(kinds)]
    assert any("Chapter" in text or "CHAPTER" in text for text in firsts)  # a novel
    assert any("```" in text for text in firsts)  # a programmer's page


def test_documents_are_whole() -> None:
    for text in _DOCUMENTS:
        assert 300 < len(text) < 8000 and "\r" not in text and text == text.strip()
        assert "=====" not in text.splitlines()
    assert len(set(_DOCUMENTS)) == len(_DOCUMENTS)
    assert 200_000 < sum(map(len, _DOCUMENTS)) < 500_000


@pytest.mark.parametrize("prompt", [*cases.PROMPTS, *cases.MORE_PROMPTS])
def test_no_prompt_that_models_are_judged_by_stands_in_it(prompt: str) -> None:
    assert not any(prompt.strip().lower() in text.lower() for text in _DOCUMENTS)
