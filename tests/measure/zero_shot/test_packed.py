"""Continuations scored in packs are those scored one at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders.tiny import VOCABULARY
from transformers import AutoModelForCausalLM

from nirvana_deploy.measure.zero_shot.packed import Pair, common_prefix, log_likelihoods, passes, trie_of


def pairs_with_shared_beginnings(count: int) -> list[Pair]:
    random = np.random.default_rng(1)

    def tokens(least: int, most: int) -> list[int]:
        return [int(token) for token in random.integers(3, VOCABULARY, size=random.integers(least, most))]

    contexts = [tokens(2, 12) for _ in range(count)]
    pairs: list[Pair] = [(context, tokens(1, 6)) for context in contexts for _ in range(3)]
    return [
        *pairs,
        (contexts[0][:2], contexts[0][2:] or [5]),
        pairs[0],
        (contexts[1], [7]),
        (contexts[1], [8]),
    ]


def test_packs_equal_single_sequences(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    pairs = pairs_with_shared_beginnings(8)
    with torch.no_grad():
        for max_tokens in (1, 40, 1000):
            found = log_likelihoods(model, pairs, max_length=512, max_tokens=max_tokens)
            for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
                ids = torch.tensor([[*context, *continuation]])
                log_p = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
                targets = ids[0, len(context) :]
                assert total == pytest.approx(float(log_p.gather(1, targets[:, None]).sum()), abs=1e-4)
                assert greedy == bool((log_p.argmax(-1) == targets).all())


def test_what_is_too_long_loses_its_beginning(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    long = ([4, 5, 6, 7, 8], [9, 10])
    cut = log_likelihoods(model, [long], max_length=4, max_tokens=9)
    assert cut == log_likelihoods(model, [([6, 7, 8], [9, 10])], max_length=64, max_tokens=9)


def test_a_trie_has_each_prefix_once() -> None:
    trie = trie_of([[1, 2], [1, 2, 3], [1, 4], [5]])
    assert trie.tokens.tolist() == [1, 2, 3, 4, 5] and trie.depths.tolist() == [0, 1, 2, 1, 0]
    assert trie.paths == ((0, 1), (0, 1, 2), (0, 3), (4,))
    assert trie.ancestors[3].tolist() == [True, False, False, True, False]
    assert common_prefix([1, 2], [1, 2, 3]) == 2 and common_prefix([], [1]) == 0


def test_passes_hold_every_sequence_once_within_the_budget() -> None:
    sequences = [[*context, *continuation] for context, continuation in pairs_with_shared_beginnings(20)]
    groups = list(passes(sequences, max_tokens=30))
    assert sorted(index for group in groups for index in group) == list(range(len(sequences)))
    assert len(groups) > 3
    for group in groups:
        assert len(group) == 1 or len(trie_of([sequences[index] for index in group]).tokens) <= 30
