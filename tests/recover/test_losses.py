"""Losses in blocks are the losses on whole logits, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from nirvana_deploy.recover.learning.losses import divergence, in_blocks, next_token, relative_error, weighted

POSITIONS, HIDDEN, VOCABULARY = 13, 8, 40


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(POSITIONS, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def head() -> torch.Tensor:
    return torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(2))


def capped(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Logits that are no linear function of states."""
    return 3.0 * torch.tanh(states @ head.T / 3.0)


@pytest.mark.parametrize("block", [1, 4, 13, 64])
def test_value_and_gradient_are_those_of_whole_logits(
    states: torch.Tensor, head: torch.Tensor, block: int
) -> None:
    wanted = states.roll(1, dims=0) * 0.7
    following = torch.arange(POSITIONS) % VOCABULARY
    following[-1] = -100
    ours = states.clone().requires_grad_()
    terms = weighted(
        (1.0, divergence(lambda s: capped(s, head), lambda s: capped(s, head), wanted)),
        (0.3, next_token(lambda s: capped(s, head), following)),
    )
    value = in_blocks(ours, terms, block=block)
    (2 * value).backward()
    theirs = states.clone().requires_grad_()
    p = capped(wanted, head).softmax(dim=-1)
    log_q = capped(theirs, head).log_softmax(dim=-1)
    expected = (p * (p.log() - log_q)).sum() + 0.3 * functional.nll_loss(
        log_q, following, reduction="sum", ignore_index=-100
    )
    (2 * expected).backward()
    torch.testing.assert_close(value.float(), expected, rtol=1e-5, atol=1e-6)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_only_some_positions_have_logits_at_a_time(states: torch.Tensor, head: torch.Tensor) -> None:
    seen: list[int] = []

    def logits(some: torch.Tensor) -> torch.Tensor:
        seen.append(len(some))
        return some @ head.T

    in_blocks(states, divergence(logits, logits, states), block=5)
    assert set(seen) == {5, 3}


def test_a_loss_of_no_weight_is_not_computed(states: torch.Tensor, head: torch.Tensor) -> None:
    def never(some: torch.Tensor, part: slice) -> torch.Tensor:
        raise AssertionError

    same = divergence(lambda s: s @ head.T, lambda s: s @ head.T, states)
    assert float(in_blocks(states, weighted((1.0, same), (0.0, never)))) == pytest.approx(0, abs=1e-4)


def test_the_error_of_states_is_relative_to_each() -> None:
    wanted = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    assert float(relative_error(wanted * 1.1, wanted)) == pytest.approx(0.01, rel=1e-4)
