"""Labels drawn from the model: their gradient is unbiased and its outer product is the Fisher information."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nirvana_deploy.prune.saliency.gradient import Head, sampled_likelihood_gradient

VOCABULARY, WIDTH, DRAWS = 7, 3, 40_000


def head_of(rows: torch.Tensor, block: int) -> Head:
    def blocks() -> Iterator[torch.Tensor]:
        yield from rows.split(block)

    return blocks


def drawn(states: torch.Tensor, rows: torch.Tensor, *, block: int, seed: int = 0) -> torch.Tensor:
    tokens = torch.zeros(states.shape[:2], dtype=torch.int64)
    draws = torch.rand(states.shape[:2], generator=torch.Generator().manual_seed(seed))
    return sampled_likelihood_gradient(iter([draws]))(states, tokens, head_of(rows, block))


@pytest.mark.parametrize("block", [1, 3, 7])
def test_the_mean_is_zero_and_the_mean_outer_product_the_fisher_information(block: int) -> None:
    torch.manual_seed(0)
    rows, state = torch.randn(VOCABULARY, WIDTH), torch.randn(WIDTH)
    p = (rows @ state).softmax(0).double()
    centered = rows.double() - p @ rows.double()
    fisher = (centered * p[:, None]).T @ centered
    found = drawn(state.expand(4, DRAWS // 4, WIDTH), rows, block=block).flatten(0, 1).double()
    noise = fisher.diagonal().sqrt() / DRAWS**0.5
    assert (found.mean(0).abs() < 4 * noise).all()
    torch.testing.assert_close(found.T @ found / DRAWS, fisher, rtol=0.05, atol=0.02 * float(fisher.trace()))


def test_every_gradient_is_that_of_the_likelihood_of_one_token() -> None:
    torch.manual_seed(1)
    rows, states = torch.randn(VOCABULARY, WIDTH), torch.randn(2, 50, WIDTH)
    leaf = states.clone().requires_grad_()
    likelihoods = (leaf @ rows.T).log_softmax(-1)
    one_each = [torch.autograd.grad(likelihoods[..., y].sum(), leaf, retain_graph=True)[0]
                for y in range(VOCABULARY)]  # fmt: skip
    found = drawn(states, rows, block=3)
    distance = torch.stack([(found - one).abs().amax(-1) for one in one_each])
    assert distance.amin(0).max() < 1e-5
    assert len(distance.argmin(0).unique()) == VOCABULARY


def test_blocks_and_seeds() -> None:
    torch.manual_seed(2)
    rows, states = torch.randn(VOCABULARY, WIDTH), torch.randn(2, 50, WIDTH)
    whole = drawn(states, rows, block=7)
    torch.testing.assert_close(drawn(states, rows, block=2), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(drawn(states, rows, block=7), whole)
    assert not torch.equal(drawn(states, rows, block=7, seed=1), whole)


def test_a_certain_model_has_nothing_to_learn() -> None:
    rows = torch.eye(WIDTH) * 100
    states = torch.eye(WIDTH)[None] * 100
    assert drawn(states, rows, block=2).abs().max() == 0
