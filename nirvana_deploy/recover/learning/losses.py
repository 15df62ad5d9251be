"""Losses on logits that are never whole: some positions at a time, value and gradient together.

For P positions and a vocabulary V, log-probabilities of student and teacher would take 8 P V bytes (2 GB at
P = 2048, V = 128256), and as much again for their gradients. The gradient by the states [P, D] is all that
training needs of them where the head is frozen; it is computed with the value, block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

BLOCK_POSITIONS = 256
"""Positions whose logits are in memory at once."""
BlockLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""States [p, D] of some positions, and which they are -> the sum of their losses."""
Logits = Callable[[torch.Tensor], torch.Tensor]
"""States [p, D] -> logits [p, V], float32."""


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, loss: BlockLoss, block: int) -> torch.Tensor:
        gradient, total = torch.empty_like(states), states.new_zeros((), dtype=torch.float64)
        for start in range(0, len(states), block):
            part = slice(start, start + block)
            leaf = states[part].detach().requires_grad_()
            with torch.enable_grad():
                value = loss(leaf, part)
                (gradient[part],) = torch.autograd.grad(value, leaf)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None


def in_blocks(states: torch.Tensor, loss: BlockLoss, *, block: int = BLOCK_POSITIONS) -> torch.Tensor:
    """The sum of ``loss`` over all positions of ``states`` [P, D], float64; differentiable by ``states``.

    Whatever else ``loss`` depends on gets no gradient.
    """
    total: torch.Tensor = _InBlocks.apply(states, loss, block)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def total(states: torch.Tensor, loss: BlockLoss, *, block: int = BLOCK_POSITIONS) -> float:
    """The sum of ``loss`` over all positions of ``states`` [P, D], without a gradient."""
    parts = (slice(start, start + block) for start in range(0, len(states), block))
    return sum(float(loss(states[part], part)) for part in parts)


def divergence(student: Logits, teacher: Logits, teacher_states: torch.Tensor) -> BlockLoss:
    """KL(teacher || student) in nats; ``teacher_states`` [P, D'] are of the same positions."""

    def loss(states: torch.Tensor, part: slice) -> torch.Tensor:
        with torch.no_grad():
            target = teacher(teacher_states[part]).log_softmax(dim=-1)
        return functional.kl_div(
            student(states).log_softmax(dim=-1), target, reduction="sum", log_target=True
        )

    return loss


def next_token(student: Logits, next_tokens: torch.Tensor) -> BlockLoss:
    """-log q(next token) in nats; ``next_tokens`` [P] are -100 where there is none."""

    def loss(states: torch.Tensor, part: slice) -> torch.Tensor:
        return functional.cross_entropy(student(states), next_tokens[part], reduction="sum")

    return loss


def weighted(*terms: tuple[float, BlockLoss]) -> BlockLoss:
    """The sum of (weight, loss); a loss of weight 0 is not computed."""
    used = [(weight, loss) for weight, loss in terms if weight]

    def loss(states: torch.Tensor, part: slice) -> torch.Tensor:
        return torch.stack([weight * one(states, part) for weight, one in used]).sum()

    return loss


def relative_error(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over positions of |states - wanted|^2 / |wanted|^2, for [P, D]."""
    return ((states - wanted).square().sum(dim=-1) / wanted.square().sum(dim=-1)).mean()
