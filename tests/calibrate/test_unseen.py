"""The text that quality is measured on because nothing was calibrated on it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

import nirvana_deploy.calib_sets as calib_sets
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.openings import OPENINGS
from nirvana_deploy.calibrate.recipe import source_names
from nirvana_deploy.calibrate.texts import known_sources, read_source
from nirvana_deploy.verify import cases

pytestmark = pytest.mark.unit
_DOCUMENTS = calib_sets.unseen()


def runs_of_words(texts: Iterable[str], length: int = 8) -> set[tuple[str, ...]]:
    """Every run of so many words, whatever stands between them."""
    found = set()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        found |= {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}
    return found


def test_it_is_no_source() -> None:
    assert "unseen" not in {*known_sources(), *source_names()}
    with pytest.raises(NirvanaError, match="calibration source 'unseen'"):
        read_source("unseen")


def test_no_source_holds_eight_words_of_it_in_a_row() -> None:
    own = runs_of_words(_DOCUMENTS)
    assert len(own) > 5_000 and own & runs_of_words([_DOCUMENTS[0][500:700]])
    for name in ("prose", "pydoc", "code"):
        assert not own & runs_of_words(read_source(name).documents), name
    long_openings = [words for words in OPENINGS if len(words.split()) > 3]  # self goes on from them
    assert not any(words.strip() in text for words in long_openings for text in _DOCUMENTS)


def test_documents_are_whole_and_apart() -> None:
    assert len(set(_DOCUMENTS)) == len(_DOCUMENTS) >= 8
    for text in _DOCUMENTS:
        assert 3_000 < len(text) < 8_000 and "\r" not in text and text == text.strip()
        assert "=====" not in text.splitlines()


@pytest.mark.parametrize("prompt", [*cases.PROMPTS, *cases.MORE_PROMPTS])
def test_no_prompt_that_models_are_judged_by_stands_in_it(prompt: str) -> None:
    assert not any(prompt.strip().lower() in text.lower() for text in _DOCUMENTS)
