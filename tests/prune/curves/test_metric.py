"""The metric of a border equals its formula."""

from __future__ import annotations

import pytest
import torch

from nirvana_deploy.prune.curves.metric import Metric

WIDTH = 6


def gradients(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """g [n, T, D] and weights of positions [n, T, 1]."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(count, 5, WIDTH, generator=generator)
    return gradient, torch.rand(count, 5, 1, generator=generator) * 0.4 + 0.8


def direct(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """G + a twentieth of its mean eigenvalue, position by position."""
    rows = (gradient.double() / weight.double()).flatten(0, 1)
    mean = torch.stack([torch.outer(row, row) for row in rows]).mean(0)
    return mean + 0.05 * torch.linalg.eigvalsh(mean).mean() * torch.eye(WIDTH)


def test_the_metric_is_the_mean_outer_product_of_weighed_gradients() -> None:
    gradient, weight = gradients(4)
    metric = Metric(WIDTH)
    for rows in (slice(0, 1), slice(1, 4)):
        metric.observe(gradient[rows], weight[rows])
    root = metric.root()
    assert root is not None and root.dtype == torch.float64
    torch.testing.assert_close(root.T @ root, direct(gradient, weight), rtol=1e-5, atol=1e-6)


def test_positions_with_massive_states_are_left_out() -> None:
    gradient, weight = gradients()
    weight[:, 0] /= 50
    gradient[:, 0] *= 1000
    metric = Metric(WIDTH)
    metric.observe(gradient, weight)
    root = metric.root()
    assert root is not None
    expected = direct(gradient[:, 1:], weight[:, 1:])
    torch.testing.assert_close(root.T @ root, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_gradients_that_are_not_finite_or_all_zero_have_no_metric(value: float) -> None:
    gradient, weight = gradients()
    gradient = gradient * 0 if value == 0 else gradient.index_fill(2, torch.tensor([1]), value)
    metric = Metric(WIDTH)
    metric.observe(gradient, weight)
    assert metric.root() is None
    assert Metric(WIDTH).root() is None


def test_few_positions_still_give_a_metric_of_full_rank() -> None:
    gradient, weight = gradients(1)
    metric = Metric(WIDTH)
    metric.observe(gradient[:, :1], weight[:, :1])
    root = metric.root()
    assert root is not None and torch.linalg.matrix_rank(root) == WIDTH
