"""How long to train: a time or a number of tokens, and how many steps that makes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.units import format_seconds

_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}
_TOKENS = {"": 1, "k": 1_000, "M": 1_000_000}
_WRITTEN = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>s|min|m|h|k|M|)")


class BudgetError(NirvanaError):
    """A budget that is too small; its message begins with the option, --recover."""


@contextmanager
def typed_as(option: str) -> Iterator[None]:
    """Let a BudgetError name ``option``, by which the budget came, in place of --recover."""
    try:
        yield
    except BudgetError as error:
        error.message = error.message.replace("--recover:", f"{option}:")
        raise


@dataclass(frozen=True)
class Budget:
    """One of the two."""

    seconds: float | None = None
    tokens: int | None = None

    def steps(self, step_tokens: int, step_seconds: float) -> int:
        """Steps of ``step_tokens`` that fit, at ``step_seconds`` each; raises BudgetError for none."""
        if self.tokens is not None:
            found = self.tokens // step_tokens
            short = f"{self.tokens:,} tokens are less than one step, which reads {step_tokens:,}"
        else:
            assert self.seconds is not None
            found = int(self.seconds / step_seconds)
            short = (
                f"{self.seconds:g} s end within the first step, "
                f"which takes {format_seconds(step_seconds)} here"
            )
        if found < 1:
            raise BudgetError(f"--recover: {short}.", hint="Give more, or a smaller step: --recover-batch 1.")
        return found


def part_of(written: str, parts: int) -> str:
    """One of equal ``parts`` of a budget as people write it; raises NirvanaError as :func:`budget_of`."""
    budget = budget_of(written)
    if parts == 1:
        return written
    if budget.tokens is not None:
        return f"{max(1, budget.tokens // parts)}"
    return f"{(budget.seconds or 0.0) / parts:.3f}s"


def budget_of(written: str) -> Budget:
    """Read "30m", "2h", "90s" or "200k", "1.5M", "65536"; raises NirvanaError for anything else."""
    found = _WRITTEN.fullmatch(written.strip())
    number = float(found["number"]) if found else 0.0
    if found is None or number <= 0:
        raise NirvanaError(
            f"--recover {written} is neither a time nor a number of tokens.",
            hint="For instance: --recover 30m, --recover 2h or --recover 200k",
        )
    if found["unit"] in _SECONDS:
        return Budget(seconds=number * _SECONDS[found["unit"]])
    return Budget(tokens=int(number * _TOKENS[found["unit"]]))
