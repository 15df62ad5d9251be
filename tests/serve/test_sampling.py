"""Drawn tokens follow the distribution that the settings say, by transformers' own processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nirvana_deploy.serve.sampling import Sampler, Sampling, _nucleus

PROMPT = [1, 2, 3]


@pytest.fixture
def logits() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=40).astype(np.float32) * 2


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.6, "repetition_penalty": 1.4},
    ],
)
def test_tokens_come_as_often_as_transformers_would_draw_them(
    settings: dict[str, Any], logits: NDArray[np.float32]
) -> None:
    processors = LogitsProcessorList()
    if penalty := settings.get("repetition_penalty"):
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(TemperatureLogitsWarper(settings["temperature"]))
    if top_k := settings.get("top_k"):
        processors.append(TopKLogitsWarper(top_k))
    if top_p := settings.get("top_p"):
        processors.append(TopPLogitsWarper(top_p))
    scores = processors(torch.tensor([PROMPT]), torch.tensor(logits)[None])
    wanted = torch.softmax(scores[0].double(), -1).numpy()
    draws = 4000
    found = np.zeros(len(logits))
    for seed in range(draws):
        found[Sampler(Sampling(**settings, seed=seed), PROMPT).next(logits)] += 1 / draws
    assert found[wanted == 0].sum() == 0
    assert np.abs(found - wanted).max() < 5 * np.sqrt(0.25 / draws)


def test_without_temperature_the_most_likely_token_is_taken(logits: NDArray[np.float32]) -> None:
    assert Sampler(Sampling(), PROMPT).next(logits) == logits.argmax()
    assert Sampler(Sampling(temperature=2.0, top_k=1), PROMPT).next(logits) == logits.argmax()
    assert Sampler(Sampling(temperature=1e-300), PROMPT).next(logits) == logits.argmax()


def test_the_same_seed_draws_the_same_tokens(logits: NDArray[np.float32]) -> None:
    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.5, seed=seed), PROMPT)
        return [sampler.next(logits) for _ in range(20)]

    assert drawn(-3) == drawn(-3) != drawn(4)
    assert drawn(None) != drawn(None)


def test_penalties_count_what_was_written_and_not_the_prompt(logits: NDArray[np.float32]) -> None:
    before = logits.copy()
    first, second = np.argsort(-logits)[:2]
    gap = float(logits[first] - logits[second])
    once = Sampler(Sampling(presence_penalty=gap + 0.01), [int(first)])
    assert [once.next(logits), once.next(logits)] == [first, second]
    twice = Sampler(Sampling(frequency_penalty=(gap + 0.01) / 2), [])
    assert [twice.next(logits) for _ in range(3)] == [first, first, second]
    assert (logits == before).all()


@pytest.mark.parametrize("size", [10, 5000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999999])
def test_a_nucleus_is_the_fewest_tokens_that_reach_the_share(size: int, top_p: float) -> None:
    shares = np.random.default_rng(size).dirichlet(np.ones(size))
    kept = _nucleus(shares, top_p)
    assert len(set(kept)) == len(kept)
    assert shares[kept].sum() >= top_p > shares[kept[:-1]].sum()
    assert shares[kept].min() >= np.delete(shares, kept).max(initial=0)
