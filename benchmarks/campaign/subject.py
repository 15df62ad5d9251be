"""What a trial of a subject returns.

A subject is a module with ``UNIT`` and ``trial(world, random)``; one that is ``LONG`` is also given the count
that is wanted. ``why_not()``, if it has one, says why it cannot run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """What one trial did and what is wrong with it."""

    said: str
    complaints: Sequence[str] = ()
    count: int = 1
    """How many of the subject's units it was."""
    output: str = ""
    """What the command printed on stderr, for whoever looks for the cause."""
