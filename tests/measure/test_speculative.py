"""When a draft pays: the acceptance at which a round gives as many tokens as it costs."""

from __future__ import annotations

import pytest

from nirvana_deploy.measure.speculative import Heard, break_even, expected_tokens, speculation_of
from nirvana_deploy.runtime.genai import Answer


@pytest.mark.parametrize(("draft_tokens", "acceptance"), [(1, 0.4), (4, 0.7), (6, 0.05)])
def test_at_its_break_even_a_round_gives_what_it_costs(draft_tokens: int, acceptance: float) -> None:
    cost = expected_tokens(draft_tokens, acceptance)
    assert break_even(draft_tokens, cost) == pytest.approx(acceptance, abs=1e-9)


def test_one_token_is_always_given_and_more_than_all_never() -> None:
    assert expected_tokens(3, 0.0) == 1 and expected_tokens(3, 1.0) == 4
    assert break_even(3, 0.9) == break_even(3, 1.0) == 0.0
    assert break_even(3, 4.0) == pytest.approx(1.0)
    assert break_even(3, 4.01) is None


def answer(tokens: int, decode_ms: float, rounds: int, evaluated: int, accepted: int) -> Answer:
    counted = {"rounds": rounds, "draft_tokens_evaluated": evaluated, "draft_tokens_accepted": accepted}
    spent = {"total_draft_ms": 0.2 * decode_ms, "total_target_ms": 0.7 * decode_ms}
    return Answer(tuple(range(tokens)), decode_ms, {**counted, **spent})


def test_times_of_a_known_run_are_found_and_the_fastest_is_chosen() -> None:
    alone = [answer(12, 120.0, 0, 0, 0)] * 8  # 10 ms a token
    drafted = {
        1: [answer(12, 100.0, 8, 8, 4)] * 8,
        2: [answer(12, 60.0, 4, 8, 8)] * 8,
        3: [answer(12, 60.0, 4, 12, 8)] * 8,
    }
    heard = Heard(tuple(alone), {count: tuple(answers) for count, answers in drafted.items()})
    found = speculation_of(heard, new_tokens=12, threads=1)
    assert found.target_token_ms == 10 and found.target_tokens_per_s == 100
    one, two, _ = found.rounds
    assert one.speedup == pytest.approx(1.2) and one.acceptance == 0.5 and one.tokens_per_round == 1.5
    assert one.cost == pytest.approx(1.25) and one.break_even == pytest.approx(0.25)
    assert two.speedup == pytest.approx(2.0) and two.draft_ms == pytest.approx(3.0)
    assert found.chosen == 2 and found.best is two  # of two that are as fast, that of fewer tokens
    assert speculation_of(heard, new_tokens=12, threads=1, among={1}).chosen == 1
    assert speculation_of(heard, new_tokens=12, threads=1, among=()).chosen == 2


def test_prompts_that_end_at_once_do_not_count() -> None:
    nothing = Answer((), 1.0, answer(0, 1.0, 1, 1, 0).stats)
    heard = Heard((answer(12, 120.0, 0, 0, 0), nothing), {1: (answer(12, 60.0, 6, 6, 6), nothing)})
    found = speculation_of(heard, new_tokens=12, threads=None)
    assert found.prompts == 2 and found.best.speedup == pytest.approx(2.0)
