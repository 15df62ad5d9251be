"""What speculative.json holds. Keys that are not named here may be there too."""

from __future__ import annotations

from typing import Annotated, Required, TypedDict

from msgspec import Meta

from nirvana_deploy.output.record_kinds import GreedyRecord, Positive


class DraftRoundRecord(TypedDict):
    """A number of draft tokens: rates, times of one round in ms, and the acceptance that it needs."""

    draft_tokens: Annotated[int, Meta(gt=0)]
    tokens_per_s: Positive
    speedup: Positive
    speedup_low: Positive
    speedup_high: Positive
    acceptance: float
    break_even: float | None
    tokens_per_round: float
    draft_ms: float
    verify_ms: float


class SameAnswers(TypedDict):
    """Whether greedy answers with the draft are the target's own, by number of draft tokens."""

    passed: bool
    greedy: Annotated[list[GreedyRecord], Meta(min_length=1)]


class SpeculativeRecord(TypedDict, total=False):
    """The content of speculative.json."""

    target: Required[str]
    draft: Required[str]
    prompts: Required[int]
    new_tokens: Required[int]
    target_tokens_per_s: Required[Positive]
    target_token_ms: Required[Positive]
    rounds: Required[Annotated[list[DraftRoundRecord], Meta(min_length=1)]]
    chosen: Required[int]
    same_answers: Required[SameAnswers]
