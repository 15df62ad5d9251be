"""The content of search.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nirvana_deploy.search.point import Found

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class PointRecord(Found):
    """What is known of a point, and whether another beats it."""

    on_front: bool
    """Of KL and time; of KL and size where nothing was timed."""
    on_size_front: bool


@dataclass(frozen=True)
class SearchRecord:
    """What a search found: every point, which one to take, and what to type for it."""

    schema: int
    model: str
    target: dict[str, float]
    """The limits, by name."""
    target_given: bool
    """Whether they are the user's."""
    recommended: str | None
    """The name of a point."""
    verdict: str
    next: list[str]
    """Commands that run the recommended point and make it again."""
    next_typed_in: str
    ways: dict[str, dict[str, Any]]
    """What each way to cut sets, by its name."""
    points: list[PointRecord]
    environment: dict[str, Any] | None
    workload: dict[str, Any] | None
    """What was timed, and where; None where nothing was."""
