"""Curves: one thing varies (the prompt's length, the batch, the threads), all else stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.workloads.named import Request

AXES = {"context": "prompt_tokens", "batch": "batch_size", "threads": "threads"}
"""Name of an axis: the option that it varies."""
_EXAMPLE = "--sweep context=128,512,2048"


@dataclass(frozen=True)
class Sweep:
    """The values of one axis."""

    axis: str
    values: tuple[int, ...]
    """Ascending."""
    base: Workload
    """What stays, and how many rounds there are."""

    @property
    def label(self) -> str:
        """For progress and errors."""
        return f"Sweep of {self.axis}"

    def at(self, value: int) -> Workload:
        """The request at one value."""
        changes: dict[str, Any] = {AXES[self.axis]: value}
        return replace(self.base, **changes)

    def request(self, value: int, round_index: int) -> Request:
        """What is asked at one value in one round."""
        here = self.at(value)
        return Request(here.batch_size, here.prompt_tokens, here.new_tokens, here.seed, round_index)

    def within(self, context_tokens: int) -> tuple[int, ...]:
        """The values whose sequences are no longer than a context."""
        return tuple(v for v in self.values if self.request(v, 0).sequence_tokens <= context_tokens)

    def longest(self) -> Request:
        """The request that fills the cache most."""
        return max((self.request(value, 0) for value in self.values), key=lambda one: one.written_tokens)


def sweeps_of(texts: Sequence[str], base: Workload) -> tuple[Sweep, ...]:
    """Read ``context=128,512`` and the like; raises NirvanaError for another axis, or what is no number."""
    sweeps = [_sweep(text, base) for text in texts]
    axes = [sweep.axis for sweep in sweeps]
    if twice := next((axis for axis in axes if axes.count(axis) > 1), None):
        raise NirvanaError(f"Two sweeps go over {twice!r}; put all its values into one.")
    return tuple(sweeps)


def _sweep(text: str, base: Workload) -> Sweep:
    axis, equals, listed = text.partition("=")
    axis = axis.strip()
    look_up(axis, AXES, what="axis of --sweep", hint=f"For example {_EXAMPLE}")
    try:
        values = tuple(sorted({int(word) for word in listed.split(",")}))
    except ValueError:
        said = repr(listed) if equals else "nothing"
        raise NirvanaError(
            f"--sweep {axis} takes whole numbers separated by commas, got {said}.", hint=f"Say {_EXAMPLE}"
        ) from None
    if len(values) < 2:
        raise NirvanaError(
            f"--sweep {text} has one value, and a curve needs two or more.", hint=f"Say {_EXAMPLE}"
        )
    sweep = Sweep(axis, values, base)
    for value in values:
        sweep.at(value)  # which refuses what the option refuses
    return sweep
