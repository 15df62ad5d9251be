"""What the training loop is told, from a budget, and what it tells; the loop itself is ``training.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nirvana_deploy.base.units import format_seconds
from nirvana_deploy.recover.budget import BudgetError, budget_of
from nirvana_deploy.recover.learning.dtype import in_bfloat16
from nirvana_deploy.recover.processes import share_of
from nirvana_deploy.recover.recipe import Recovery
from nirvana_deploy.recover.record import CurvePoint

_MEASUREMENTS = 12
"""Of the held-out KL, evenly spread over the steps."""
_WARM_UP, _LAST_RATE = 0.05, 0.05
"""Share of the steps, and of the peak learning rate."""
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "cosine": ("cosine_with_min_lr", {"min_lr_rate": _LAST_RATE}),
    "linear": ("linear", {}),
    "constant": ("constant_with_warmup", {}),
}


@dataclass(frozen=True)
class Course:
    """How training went."""

    curve: tuple[CurvePoint, ...]
    kept_step: int
    steps_done: int
    seconds: float
    stopped: str = ""
    """Why training ended before its time, where its loss was no number any more."""


@dataclass(frozen=True)
class Loop:
    """What the loop is told."""

    steps: int
    """A multiple of ``measured_every``."""
    wanted_windows: int
    """Text is drawn for so many; a budget in time leaves fewer steps once it is written."""
    step_windows: int
    micro_batch: int
    learning_rate: float
    seed: int
    bfloat16: bool = False
    """Whether products are computed in it; decided once, for all processes and for who goes on."""
    patience: int = 4
    """Measurements without a better one after which training stops."""
    schedule: str = "cosine"
    """Of the learning rate."""
    warm_up: int | None = None
    """Steps of it; None: a share of all."""
    step_seconds: float = 0.0
    """As measured, where the budget is a time."""

    @property
    def warm_up_steps(self) -> int:
        """Steps until the learning rate is at its peak."""
        return max(1, round(_WARM_UP * self.steps)) if self.warm_up is None else self.warm_up

    @property
    def scheduler(self) -> tuple[str, dict[str, Any]]:
        """The schedule as transformers names it, and what it takes."""
        return _SCHEDULERS[self.schedule]

    @property
    def measured_every(self) -> int:
        """Steps between two measurements of the held-out KL."""
        return max(1, self.steps // _MEASUREMENTS)


def whole_steps(steps: int) -> int:
    """At most ``steps`` of which the last one is measured."""
    return steps - steps % max(1, steps // _MEASUREMENTS)


def planned(recipe: Recovery, *, seq_len: int, seed: int, seconds_of_step: Callable[[int], float]) -> Loop:
    """The loop of a budget, as if text cost nothing.

    ``seconds_of_step`` measures a step on windows of ``seq_len`` tokens, and is asked where the budget is a
    time. Raises BudgetError for one that ends within a step.
    """
    batch, budget = recipe.recover_batch, budget_of(recipe.recover or "")
    step_seconds = 1.0 if budget.seconds is None else seconds_of_step(seq_len)
    steps = whole_steps(budget.steps(batch * seq_len, step_seconds))
    return Loop(
        steps=steps,
        wanted_windows=steps * batch,
        step_windows=batch,
        micro_batch=micro_batch_of(recipe),
        learning_rate=recipe.learning_rate,
        seed=seed,
        bfloat16=in_bfloat16(recipe),
        patience=recipe.recover_patience,
        schedule=recipe.recover_schedule,
        warm_up=recipe.recover_warm_up,
        step_seconds=step_seconds,
    )


def shortened(loop: Loop, recipe: Recovery, *, seq_len: int, writing_seconds: float) -> Loop:
    """The loop in what gathering the text left of a budget in time; raises BudgetError for no step."""
    budget = budget_of(recipe.recover or "")
    if budget.seconds is None:
        return loop
    step_seconds = loop.step_seconds or budget.seconds / loop.steps
    steps = min(loop.steps, int((budget.seconds - writing_seconds) / step_seconds))
    if steps < 1:
        raise BudgetError(
            f"--recover: gathering text took {format_seconds(writing_seconds)} of "
            f"{format_seconds(budget.seconds)}, and what is left ends within the first step, which takes "
            f"{format_seconds(step_seconds)} here.",
            hint=f"Give at least {format_seconds(writing_seconds + 2 * step_seconds)}, or text that the "
            "model does not have to write: --recover-text prose,pydoc:0.4",
        )
    return replace(loop, steps=whole_steps(steps))


def micro_batch_of(recipe: Recovery) -> int:
    """Windows at a time in each process, which must divide its share of a step."""
    share = share_of(recipe.recover_batch)
    micro_batch = min(recipe.recover_micro_batch or share, share)
    while share % micro_batch:
        micro_batch -= 1
    return micro_batch
