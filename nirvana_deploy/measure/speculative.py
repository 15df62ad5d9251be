"""What a draft gains: tokens per second beside the target alone, and the acceptance at which it pays.

Of k proposals, each accepted with probability a if those before it were, a round gives 1 + a + ... + a^k
tokens. It costs r passes of the target alone, as measured: the passes of the draft, and the one over k + 1
tokens. It pays where the first is more than the second; where they are equal, a is its break-even.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.measure.rounds.ratios import ratio_of
from nirvana_deploy.runtime.genai import Answer, GenaiAnswers, target_alone

DRAFT_TOKENS = (1, 2, 3, 4, 5, 6)
"""What is tried."""
NEW_TOKENS = 32
_STEPS = 60


@dataclass(frozen=True)
class DraftRound:
    """What proposing ``draft_tokens`` at a time does."""

    draft_tokens: int
    tokens_per_s: float
    """Median over the prompts."""
    speedup: float
    """Median over the prompts of the target's time to its own: both answer each prompt in turn."""
    speedup_low: float
    speedup_high: float
    confidence: float
    """Of the true median being from low to high (``rounds/ratios.py``)."""
    acceptance: float
    """Accepted of the proposals that were looked at: those up to the first that was refused."""
    tokens_per_round: float
    round_ms: float
    draft_ms: float
    """Of it, in the draft."""
    verify_ms: float
    """Of it, in the target."""
    cost: float
    """Of a round, in tokens of the target alone."""
    break_even: float | None
    """The acceptance at which a round gives as many tokens as it costs; None: none does."""


@dataclass(frozen=True)
class Speculation:
    """A target with its draft, measured."""

    prompts: int
    new_tokens: int
    threads: int | None
    target_tokens_per_s: float
    target_token_ms: float
    rounds: tuple[DraftRound, ...]
    chosen: int
    """Draft tokens of the fastest of those that may be chosen."""

    @property
    def best(self) -> DraftRound:
        """The one that was chosen."""
        return next(one for one in self.rounds if one.draft_tokens == self.chosen)


@dataclass(frozen=True)
class Heard:
    """Answers to each prompt: the target's own, and those with a draft, by draft tokens."""

    alone: tuple[Answer, ...]
    drafted: dict[int, tuple[Answer, ...]]


def hear(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    draft_tokens: Sequence[int] = DRAFT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Heard:
    """Let the target of ``folder`` answer each prompt alone and with its draft, one after the other.

    The order changes from prompt to prompt. Raises NirvanaError when onnxruntime-genai refuses the folder.
    """
    ways: tuple[int | None, ...] = (None, *draft_tokens)
    found: dict[int | None, list[Answer]] = {way: [] for way in ways}
    with ExitStack() as stack:
        alone = GenaiAnswers(stack.enter_context(target_alone(folder)), threads=threads)
        drafted = GenaiAnswers(folder, threads=threads)
        for one, way in ((alone, None), (drafted, draft_tokens[0])):  # warm up
            one.answer(prompts[0], new_tokens=min(new_tokens, 8), draft_tokens=way)
        label = f"Drafting {draft_tokens[0]} to {draft_tokens[-1]} tokens"
        advance = stack.enter_context(progress.task(label, len(prompts)))
        for turn, prompt in enumerate(prompts):
            shift = turn % len(ways)
            for way in (*ways[shift:], *ways[:shift]):
                model = alone if way is None else drafted
                found[way].append(model.answer(prompt, new_tokens=new_tokens, draft_tokens=way))
            advance(1)
    return Heard(tuple(found[None]), {way: tuple(found[way]) for way in draft_tokens})


def speculation_of(
    heard: Heard, *, new_tokens: int, threads: int | None, among: Collection[int] | None = None
) -> Speculation:
    """The numbers of what was heard; the fastest is chosen, of equally fast ones that of fewer tokens.

    ``among`` these numbers of draft tokens, or all where it is None or empty.
    """
    said = [index for index, answer in enumerate(heard.alone) if answer.ids]
    alone_ms = [heard.alone[index].token_ms for index in said] or [0.0]
    token_ms = sum(heard.alone[i].decode_ms for i in said) / max(
        1, sum(len(heard.alone[i].ids) for i in said)
    )
    rounds = tuple(
        _round(draft_tokens, [answers[index] for index in said], alone_ms, token_ms)
        for draft_tokens, answers in heard.drafted.items()
    )
    open_to = [one for one in rounds if one.draft_tokens in (among or heard.drafted)]
    best = max(open_to, key=lambda one: (one.speedup, -one.draft_tokens))
    return Speculation(
        prompts=len(heard.alone),
        new_tokens=new_tokens,
        threads=threads,
        target_tokens_per_s=1e3 / median(alone_ms),
        target_token_ms=token_ms,
        rounds=rounds,
        chosen=best.draft_tokens,
    )


def _per_token(answers: Sequence[Answer]) -> float:
    tokens = sum(len(answer.ids) for answer in answers)
    return sum(answer.decode_ms for answer in answers) / max(1, tokens)


def _round(
    draft_tokens: int, answers: Sequence[Answer], alone_ms: Sequence[float], token_ms: float
) -> DraftRound:
    def total(key: str) -> float:
        return sum(float(answer.stats[key]) for answer in answers)

    rounds = total("rounds")
    ratio = ratio_of(alone_ms, [answer.token_ms for answer in answers])
    round_ms = sum(answer.decode_ms for answer in answers) / rounds
    return DraftRound(
        draft_tokens=draft_tokens,
        tokens_per_s=1e3 / median(answer.token_ms for answer in answers),
        speedup=ratio.p50,
        speedup_low=ratio.low,
        speedup_high=ratio.high,
        confidence=ratio.confidence,
        acceptance=total("draft_tokens_accepted") / max(1.0, total("draft_tokens_evaluated")),
        tokens_per_round=sum(len(answer.ids) for answer in answers) / rounds,
        round_ms=round_ms,
        draft_ms=total("total_draft_ms") / rounds,
        verify_ms=total("total_target_ms") / rounds,
        cost=round_ms / token_ms,
        break_even=break_even(draft_tokens, round_ms / token_ms),
    )


def break_even(draft_tokens: int, cost: float) -> float | None:
    """The acceptance a in [0, 1] of 1 + a + ... + a^k = ``cost``; None where no acceptance pays."""
    if cost > draft_tokens + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if expected_tokens(draft_tokens, middle) < cost:
            low = middle
        else:
            high = middle
    return high if cost > 1 else 0.0


def expected_tokens(draft_tokens: int, acceptance: float) -> float:
    """Tokens of a round: 1 + a + ... + a^k."""
    return sum(acceptance**power for power in range(draft_tokens + 1))
