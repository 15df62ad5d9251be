from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.measure.quality import quality_of, window_scores
from nirvana_deploy.runtime.runner import checked_prompts


class TableModel:
    """Logits that depend on the current token only: row ``token`` of a table [V, V]."""

    start_token = None

    def __init__(self, table: NDArray[np.float32]) -> None:
        self.table = table
        self.windows_read = 0

    def prefill(
        self, tokens: NDArray[np.int64], attention_mask: Any = None, answer: Any = None
    ) -> tuple[NDArray[np.float32], Any]:
        self.windows_read += 1
        return self.table[
            checked_prompts(tokens, attention_mask, answer, vocab_size=len(self.table))[0]
        ], None


def random_model(seed: int, vocab: int = 13, scale: float = 3.0) -> TableModel:
    return TableModel((scale * np.random.default_rng(seed).normal(size=(vocab, vocab))).astype(np.float32))


WINDOWS = np.random.default_rng(5).integers(0, 13, size=(4, 70))


def test_kl_of_two_coins_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = log 2 - log(3) / 2
    p, q = np.log([[0.5, 0.5]]).astype(np.float32), np.log([[0.25, 0.75]]).astype(np.float32)
    scores = window_scores({"p": p, "q": q}, np.array([0]))["q"]
    assert scores.kl[0] == pytest.approx(np.log(2) - np.log(3) / 2, abs=1e-7)
    assert scores.negative_log_likelihood[0] == pytest.approx(np.log(4), abs=1e-6)


def test_scores_do_not_depend_on_a_shift_of_the_logits() -> None:
    logits = random_model(1).table
    shifted = window_scores({"p": logits, "shifted": logits + 50}, np.arange(13))["shifted"]
    np.testing.assert_allclose(shifted.kl, 0, atol=1e-10)


def test_perplexity_and_kl_equal_torch() -> None:
    dense, pruned = random_model(1), random_model(2)
    result = quality_of(dense, {"pruned": pruned}, WINDOWS)
    p, q = (torch.tensor(m.table).double()[WINDOWS[:, :-1]] for m in (dense, pruned))
    loss = torch.nn.functional.cross_entropy(q.flatten(0, 1), torch.tensor(WINDOWS[:, 1:]).flatten())
    log_p, log_q = (logits.log_softmax(-1) for logits in (p, q))
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    measured = result["pruned"]
    assert measured["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-9)
    assert measured["kl_vs_dense"] == pytest.approx(kl.mean().item(), rel=1e-9)
    windows, tokens = kl.mean(dim=1), kl.flatten()
    assert measured["kl_standard_error"] == pytest.approx((windows.std() / 2).item(), rel=1e-9)
    assert measured["kl_standard_error_tokens"] == pytest.approx((tokens.std() / 276**0.5).item(), rel=1e-9)
    assert measured["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert (measured["tokens"], measured["windows"]) == (4 * 69, 4)


def test_the_baseline_agrees_with_itself_and_runs_once_per_window() -> None:
    dense = random_model(1)
    result = quality_of(dense, {"same": random_model(1), "other": random_model(2)}, WINDOWS)
    assert list(result) == ["dense", "same", "other"]
    for name in ("dense", "same"):
        assert result[name]["kl_vs_dense"] == 0
        assert result[name]["kl_standard_error"] == 0
        assert result[name]["top1_agreement"] == 1
    assert result["same"]["perplexity"] == result["dense"]["perplexity"] != result["other"]["perplexity"]
    assert dense.windows_read == len(WINDOWS)


def test_each_kind_of_text_has_the_numbers_of_its_windows_alone() -> None:
    models = random_model(1), {"pruned": random_model(2)}
    parts = quality_of(*models, WINDOWS, kinds=["a", "b", "a", "a"])["pruned"].pop("parts")
    assert list(parts) == ["a", "b"]
    assert parts["a"] == quality_of(*models, WINDOWS[[0, 2, 3]])["pruned"]
    assert parts["b"] == quality_of(*models, WINDOWS[[1]])["pruned"]


def test_one_window_has_no_error_over_windows() -> None:
    result = quality_of(random_model(1), {"pruned": random_model(2)}, WINDOWS[:1])
    assert result["pruned"]["kl_standard_error"] is None
    assert result["pruned"]["kl_standard_error_tokens"] > 0


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("who", ["dense", "pruned"])
def test_logits_that_are_not_finite_name_the_variant(who: str, broken: float) -> None:
    models = {"dense": random_model(1), "pruned": random_model(2)}
    models[who].table[WINDOWS[0, 3], 0] = broken
    first = list(WINDOWS[0]).index(WINDOWS[0, 3])
    with pytest.raises(NirvanaError, match=f"{who}, window 0 are not finite .* position {first}"):
        quality_of(models["dense"], {"pruned": models["pruned"]}, WINDOWS)


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(NirvanaError, match="pruned has 14 logits per token and dense 13"):
        quality_of(random_model(1), {"pruned": random_model(2, vocab=14)}, WINDOWS)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_windows_without_a_next_token_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(NirvanaError, match="T >= 2"):
        quality_of(random_model(1), {}, np.zeros(shape, dtype=np.int64))


def test_kl_to_the_parent_is_the_kl_between_the_two() -> None:
    models = {"pruned": random_model(2), "pruned-int8": random_model(3)}
    parents = {"pruned-int8": "pruned"}
    found = quality_of(random_model(1), models, WINDOWS, parents=parents)
    alone = quality_of(random_model(2), {"int8": random_model(3)}, WINDOWS, baseline_name="pruned")
    assert "kl_vs_parent" not in found["pruned"]
    assert found["pruned-int8"]["kl_vs_parent"] == pytest.approx(alone["int8"]["kl_vs_dense"], rel=1e-12)
    assert found["pruned-int8"]["kl_vs_parent"] != found["pruned-int8"]["kl_vs_dense"]


def test_the_baseline_can_be_the_parent() -> None:
    found = quality_of(
        random_model(1), {"w8": random_model(2)}, WINDOWS, baseline_name="pruned", parents={"w8": "pruned"}
    )
    assert found["w8"]["kl_vs_parent"] == found["w8"]["kl_vs_dense"] > 0
