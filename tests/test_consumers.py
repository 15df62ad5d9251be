"""The table "where does it run": a row for what ran and passed, a reason for what did not."""

from __future__ import annotations

from typing import Any

import pytest
from test_readme import script


def found(outcome: str, test: str = "a", **more: str) -> dict[str, Any]:
    return {
        "consumer": "llama.cpp",
        "artifact": "GGUF",
        "proof": "equal tokens",
        "version": "1",
        "outcome": outcome,
        "test": test,
        **more,
    }


def test_only_what_passed_is_claimed() -> None:
    consumers = script("consumers")
    rows = consumers.rows_of([found("passed"), found("passed", "b")])
    record = {"rows": rows, "not_run": [{"consumer": "vLLM", "artifact": "HF folder", "reason": "no wheel"}]}
    assert consumers.section(record).splitlines()[2:] == [
        "| llama.cpp 1 | GGUF | equal tokens |",
        "| vLLM | HF folder | not run: no wheel |",
    ]


@pytest.mark.parametrize(("outcome", "cell"), [("failed", "FAILED"), ("skipped", "not run: no node here")])
def test_one_test_that_does_not_pass_takes_the_row_away(outcome: str, cell: str) -> None:
    consumers = script("consumers")
    worse = found(outcome, "b", reason="no node here")
    rows = consumers.rows_of([found("passed"), worse, found("passed", "c")])
    assert rows[0]["tests"] == ["a", "b", "c"]
    table = consumers.section({"rows": rows, "not_run": []})
    assert "equal tokens" not in table and f"| GGUF | {cell} |" in table
