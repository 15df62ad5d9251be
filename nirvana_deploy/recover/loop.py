"""What the training loop is told, and what it tells; the loop itself is ``training.py``."""

from __future__ import annotations

from dataclasses import dataclass

from nirvana_deploy.recover.record import CurvePoint

_MEASUREMENTS = 12
"""Of the held-out KL, evenly spread over the steps."""


@dataclass(frozen=True)
class Course:
    """How training went."""

    curve: tuple[CurvePoint, ...]
    kept_step: int
    steps_done: int
    seconds: float


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

    @property
    def measured_every(self) -> int:
        """Steps between two measurements of the held-out KL."""
        return max(1, self.steps // _MEASUREMENTS)


def whole_steps(steps: int) -> int:
    """At most ``steps`` of which the last one is measured."""
    return steps - steps % max(1, steps // _MEASUREMENTS)
