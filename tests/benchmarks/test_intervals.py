"""The intervals of real contests: a runner that sleeps is slower, and the section counts what was said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.scripts import script
from builders.tiny_decoder import write_tiny_decoder

pytestmark = pytest.mark.integration


def test_the_sleeping_contender_is_slower_in_a_real_contest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intervals, record = script("intervals"), tmp_path / "intervals.json"
    folder = write_tiny_decoder(tmp_path / "onnx")
    words = ["intervals", "--folder", str(folder), "--repetitions", "1", "--precision", "10"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(record)])
    intervals.main()
    found = json.loads(record.read_text())
    (contest,) = found["contests"]
    assert contest["rounds"] >= 11
    assert contest["slower"]["p50"] < min(contest["again"]["p50"], 0.96)  # a nap is longer than such a step
    assert "| the same model twice: 1 in the interval | " in intervals.section(found)


def test_the_section_counts_what_the_intervals_say() -> None:
    def ratio(low: float, p50: float, high: float) -> dict[str, Any]:
        return {"low": low, "p50": p50, "high": high, "confidence": 0.96}

    contests = [
        {"rounds": 11, "again": ratio(0.99, 1, 1.01), "slower": ratio(0.94, 0.95, 0.96), "cautions": []},
        {
            "rounds": 17,
            "again": ratio(1.01, 1.02, 1.03),
            "slower": ratio(0.94, 0.97, 1.01),
            "cautions": ["x"],
        },
        {"rounds": 12, "again": ratio(0.9, 1, 1.1), "slower": ratio(1.1, 1.2, 1.3), "cautions": []},
    ]
    where = {"threads": 1, "cpu": "a CPU"}
    record = {"contests": contests, "environment": where, "workload": {"precision": 0.02}, "slower": 1.05}
    said = script("intervals").section(record)
    assert "1 in the interval | 2 |" in said and "sleeps 5%: found slower | 1 |" in said
    assert "11 to 17 rounds" in said and "1 of 3 had a caution" in said
