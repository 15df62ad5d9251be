"""Continuations scored in packs are those scored one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.extras import needs
from builders.tiny import KINDS, MORE_KINDS, VOCABULARY, write_tiny
from transformers import AutoModelForCausalLM

from nirvana_deploy.measure.zero_shot.packed import (
    Pair,
    attends_to_all,
    common_prefix,
    log_likelihoods,
    passes,
    trie_of,
)
from nirvana_deploy.measure.zero_shot.tasks import packing_model


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


@torch.no_grad()
def assert_equal_single_sequences(model: Any, pairs: list[Pair], found: list[tuple[float, bool]]) -> None:
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        ids = torch.tensor([[*context, *continuation]])
        log_p = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
        targets = ids[0, len(context) :]
        assert total == pytest.approx(float(log_p.gather(1, targets[:, None]).sum()), abs=1e-4)
        assert greedy == bool((log_p.argmax(-1) == targets).all())


def test_packs_equal_single_sequences(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    pairs = pairs_with_shared_beginnings(8)
    for max_tokens in (1, 40, 1000):
        found = log_likelihoods(model, pairs, max_length=512, max_tokens=max_tokens)
        assert_equal_single_sequences(model, pairs, found)


@pytest.mark.parametrize("kind", ["mistral", "mistral-window", "gemma3"])
@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_windows_are_kept(tmp_path: Path, kind: str) -> None:
    """Windows of 6 tokens, in every layer or in two of three, and sequences of up to 17."""
    needs("lm_eval")
    folder = write_tiny(tmp_path / "model", kind)
    pairs = pairs_with_shared_beginnings(8)
    assert max(len(context) for context, _ in pairs) > 6
    arguments = {"pretrained": str(folder), "dtype": "float32"}
    found = packing_model("hf", arguments, "cpu", 4)._loglikelihood_tokens(
        [(("", ""), list(context), list(continuation)) for context, continuation in pairs]
    )
    assert_equal_single_sequences(AutoModelForCausalLM.from_pretrained(folder).eval(), pairs, found)


def test_a_window_counts_up_to_the_context() -> None:
    for kind, make in KINDS.items():
        assert attends_to_all(make(), tokens=512), kind
    for kind in ("mistral-window", "qwen2-window", "gemma3", "phi3"):
        config = MORE_KINDS[kind]()
        window = config.sliding_window
        assert attends_to_all(config, tokens=window) and not attends_to_all(config, tokens=window + 1)
    recurrent = MORE_KINDS["qwen2-window"]()
    recurrent.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert not attends_to_all(recurrent, tokens=4)


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
