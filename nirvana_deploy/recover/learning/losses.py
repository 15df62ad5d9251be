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
_ROWS = 8
"""Of logits that a CPU compares at once: a few stay in its caches."""
BlockLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""States [p, D] of some positions, and which they are -> the sum of their losses."""
Logits = Callable[[torch.Tensor], torch.Tensor]
"""States [p, D] -> logits [p, V], in the dtype of the products."""


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


class _Divergence(torch.autograd.Function):
    """Sum of KL(p || q) of logits, whose gradient by those of q is q - p."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        gradient, total = torch.empty_like(student), student.new_zeros((), dtype=torch.float64)
        at_once = _ROWS if student.device.type == "cpu" else len(student)
        for start in range(0, len(student), at_once):
            rows = slice(start, start + at_once)
            log_q, log_p = (at_least_float32(one[rows]).log_softmax(dim=-1) for one in (student, teacher))
            p = log_p.exp()
            total += torch.sum(p * log_p.sub_(log_q), dtype=torch.float64)
            if ctx.needs_input_grad[0]:
                gradient[rows] = log_q.exp_().sub_(p)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None


def divergence(student: Logits, teacher: Logits, teacher_states: torch.Tensor) -> BlockLoss:
    """KL(teacher || student) in nats; ``teacher_states`` [P, D'] are of the same positions."""

    def loss(states: torch.Tensor, part: slice) -> torch.Tensor:
        with torch.no_grad():
            target = teacher(teacher_states[part])
        found: torch.Tensor = _Divergence.apply(student(states), target)  # type: ignore[no-untyped-call]
        return found

    return loss


def next_token(student: Logits, next_tokens: torch.Tensor) -> BlockLoss:
    """-log q(next token) in nats; ``next_tokens`` [P] are -100 where there is none."""

    def loss(states: torch.Tensor, part: slice) -> torch.Tensor:
        logits = at_least_float32(student(states))
        return functional.cross_entropy(logits, next_tokens[part], reduction="sum").double()

    return loss


def weighted(*terms: tuple[float, BlockLoss]) -> BlockLoss:
    """The sum of (weight, loss); a loss of weight 0 is not computed."""
    used = [(weight, loss) for weight, loss in terms if weight]

    def loss(states: torch.Tensor, part: slice) -> torch.Tensor:
        return torch.stack([weight * one(states, part) for weight, one in used]).sum()

    return loss


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Wide enough for an exponential."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def relative_error(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over positions of |states - wanted|^2 / |wanted|^2, for [P, D]."""
    return ((states - wanted).square().sum(dim=-1) / wanted.square().sum(dim=-1)).mean()
