"""What is said of a draft: that output stays the same, and whether it pays."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nirvana_deploy.report.pages.speculative import HEADERS, rows, says
from nirvana_deploy.report.table import TIMES

ROUND: dict[str, Any] = {
    "draft_tokens": 2,
    "tokens_per_s": 60.0,
    "speedup": 1.5,
    "speedup_low": 1.4,
    "speedup_high": 1.6,
    "confidence": 0.95,
    "acceptance": 0.75,
    "tokens_per_round": 2.3,
    "round_ms": 38.0,
    "draft_ms": 10.0,
    "verify_ms": 27.0,
    "cost": 1.5,
    "break_even": 0.37,
}
CHECK: dict[str, Any] = {"equal_prompts": 20, "ties": 0, "passed": True}
RECORD: dict[str, Any] = {
    "target": "dense",
    "draft": "pruned-w4",
    "prompts": 20,
    "new_tokens": 48,
    "target_tokens_per_s": 40.0,
    "target_token_ms": 25.0,
    "rounds": [ROUND, {**ROUND, "draft_tokens": 3, "break_even": None}],
    "chosen": 2,
    "same_answers": {"passed": True, "greedy": [CHECK]},
}


def test_every_row_has_a_cell_for_each_header() -> None:
    found = rows(RECORD)
    assert [row[0] for row in found] == ["none", "2", "3"]
    assert all(len(row) == len(HEADERS) for row in found)
    assert found[1][3:5] == ("75.0%", "37.0%") and found[2][4] == "never"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, f"it is 1.50{TIMES} as fast."),
        ({"speedup": 1.1, "speedup_low": 0.9}, f"1.10{TIMES} as fast, which may be chance"),
        ({"speedup": 0.8, "speedup_low": 0.7}, "The draft does not pay: at its best"),
        (
            {"speedup": 0.8, "speedup_low": 0.7},
            "75.0% of the tokens looked at are accepted, and it pays above 37.0%",
        ),
        ({"speedup": 0.4, "speedup_low": 0.3, "break_even": None}, "no acceptance would pay"),
    ],
)
def test_whether_it_pays_is_said(changes: dict[str, Any], said: str) -> None:
    assert said in says({**RECORD, "rounds": [{**ROUND, **changes}]})[1]


def test_whether_output_is_the_targets_own_is_said() -> None:
    same = says(RECORD)[0]
    assert same.startswith("Greedy answers are those of dense, token for token: 20 of 20")
    tied = copy.deepcopy(RECORD)
    tied["same_answers"]["greedy"].append({**CHECK, "equal_prompts": 19, "ties": 1})
    assert "19 of 20" in says(tied)[0] and "1 part at a tie" in says(tied)[0]
    some = copy.deepcopy(RECORD)
    some["same_answers"]["greedy"].append({**CHECK, "equal_prompts": 10, "passed": False})
    assert "20 of 20" in says(some)[0] and "1 of 2 numbers of draft tokens; 1 change some" in says(some)[0]
    other = copy.deepcopy(RECORD)
    other["same_answers"] = {"passed": False, "greedy": [{**CHECK, "equal_prompts": 3, "passed": False}]}
    assert says(other)[0] == "The draft changes answers: 3 of 20 are those of dense."
