"""Which tokens each stack of a model reads of a window."""

from __future__ import annotations

import numpy as np
import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.families import FAMILIES
from nirvana_deploy.model.reading import first_decoder_token, stack_lengths, stack_tokens, teacher_forced

WINDOWS = np.arange(10, 24).reshape(2, 7)


def test_one_rule_names_the_first_token_of_a_decoder() -> None:
    assert first_decoder_token({"decoder_start_token_id": 5, "pad_token_id": 7}) == 5
    assert first_decoder_token({"decoder_start_token_id": 0, "pad_token_id": 7}) == 0
    for silent in ({"pad_token_id": 7}, {"decoder_start_token_id": None, "pad_token_id": 7}):
        assert first_decoder_token(silent) == 7
    with pytest.raises(NirvanaError, match="no decoder_start_token_id and no pad_token_id") as caught:
        first_decoder_token({"eos_token_id": 1})
    assert "decoder_start_token_id" in str(caught.value.hint)


def test_an_encoder_reads_the_first_half_and_its_decoder_predicts_the_second() -> None:
    read, written = teacher_forced(WINDOWS, start_token=3)
    assert read.tolist() == [[10, 11, 12], [17, 18, 19]]
    assert written.tolist() == [[3, 13, 14, 15, 16], [3, 20, 21, 22, 23]] and written.dtype == np.int64
    with pytest.raises(NirvanaError, match="at least 2 tokens, got 1"):
        teacher_forced(WINDOWS[:, :1], start_token=3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seq_len", [2, 6, 7])
def test_every_stack_is_given_its_tokens(family: str, seq_len: int) -> None:
    given = stack_tokens(FAMILIES[family], {"pad_token_id": 3}, WINDOWS[:, :seq_len])
    assert len(given) == len(FAMILIES[family].stacks)
    assert stack_lengths(FAMILIES[family], seq_len) == tuple(tokens.shape[1] for tokens in given)
    if len(given) == 1:
        assert np.array_equal(given[0], WINDOWS[:, :seq_len])
