"""What a draft gains, in words and as a table: the same output, and how much faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.units import format_ms, format_number, format_share
from nirvana_deploy.output.layout import SPECULATIVE_FILE
from nirvana_deploy.report.table import ABSENT, format_times

HEADERS = (
    "Draft tokens",
    "Tokens per second",
    "Times the target",
    "Accepted",
    "Pays above",
    "Tokens per round",
    "Draft, per round",
    "Target, per round",
)


def rows(record: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """A row for the target alone, then one for each number of draft tokens."""
    alone = ("none", format_number(record["target_tokens_per_s"]), format_times(1.0))
    first = (*alone, ABSENT, ABSENT, "1", ABSENT, format_ms(record["target_token_ms"]))
    return (first, *(_row(one) for one in record["rounds"]))


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(one["draft_tokens"]),
        format_number(one["tokens_per_s"]),
        f"{format_times(one['speedup'])} ({format_times(one['speedup_low'])} to "
        f"{format_times(one['speedup_high'])})",
        format_share(one["acceptance"]),
        "never" if one["break_even"] is None else format_share(one["break_even"]),
        format_number(one["tokens_per_round"]),
        format_ms(one["draft_ms"]),
        format_ms(one["verify_ms"]),
    )


def says(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Whether the output is the target's own, and whether the draft pays: two sentences."""
    return _same(record), _pays(record)


def best_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The number of draft tokens that was chosen; raises NirvanaError for one that was not measured."""
    found: Mapping[str, Any]
    for found in record["rounds"]:
        if found["draft_tokens"] == record["chosen"]:
            return found
    raise NirvanaError(
        f"{SPECULATIVE_FILE}: {record['chosen']} draft tokens are chosen, which were not measured.",
        hint="Measure again: nirvana-deploy benchmark OUT/speculative",
    )


def _same(record: Mapping[str, Any]) -> str:
    checks = record["same_answers"]["greedy"]
    if not record["same_answers"]["passed"]:
        equal = min(check["equal_prompts"] for check in checks)
        return f"The draft changes answers: {equal} of {record['prompts']} are those of {record['target']}."
    same = [check for check in checks if check["passed"]] or checks
    equal = min(check["equal_prompts"] for check in same)
    ties = max(check["ties"] for check in same)
    tied = f"; up to {ties} part at a tie, where {record['target']} itself is undecided" if ties else ""
    which, changed = "every number", ""
    if others := len(checks) - len(same):
        which, changed = f"{len(same)} of {len(checks)} numbers", f"; {others} change some and are not chosen"
    return (
        f"Greedy answers are those of {record['target']}, token for token: {equal} of {record['prompts']} "
        f"prompts of {record['new_tokens']} tokens with {which} of draft tokens{tied}{changed}."
    )


def _pays(record: Mapping[str, Any]) -> str:
    best = best_of(record)
    what = f"{record['draft']} drafting {best['draft_tokens']} at a time"
    speed = f"{format_times(best['speedup'])} as fast"
    if best["speedup_low"] > 1:
        return f"With {what} it is {speed}."
    accepted = f"{format_share(best['acceptance'])} of the tokens looked at are accepted"
    needed = (
        "and no acceptance would pay: a round costs more than the tokens it can give"
        if best["break_even"] is None
        else f"and it pays above {format_share(best['break_even'])}"
    )
    if best["speedup"] > 1:
        return f"With {what} it is {speed}, which may be chance: {accepted}, {needed}."
    return f"The draft does not pay: at its best, {what}, it is {speed}; {accepted}, {needed}."
