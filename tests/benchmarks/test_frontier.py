"""What counts as worth its cost: invented points of a search."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from builders.scripts import ROOT


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import frontier

    return frontier


def point(sparsity: float, scheme: str | None, ms: float, kl: float, *, on_front: bool) -> dict[str, Any]:
    name = "-".join([f"s{sparsity:g}" if sparsity else "dense", *([scheme] if scheme else [])])
    return {
        "name": name,
        "sparsity": sparsity,
        "scheme": scheme,
        "kl": kl,
        "kl_standard_error": 0.01,
        "perplexity": 10.0,
        "perplexity_ratio": 1.0,
        "accuracy": None,
        "accuracy_standard_error": None,
        "weights_bytes": 1_000_000,
        "tpot_ms": ms,
        "speedup": 12 / ms,
        "speedup_interval": [12 / ms - 0.1, 12 / ms + 0.1],
        "failed": None,
        "unverified": None,
        "on_front": on_front,
    }


POINTS = [
    point(0.0, None, 12.0, 0.0, on_front=True),
    point(0.2, None, 10.0, 0.3, on_front=False),
    point(0.0, "w4", 4.0, 0.1, on_front=True),
    point(0.2, "w4", 3.0, 0.4, on_front=True),
]
RECORD = {
    "points": POINTS,
    "recommended": "dense-w4",
    "environment": {"threads": 2, "cpu": "a CPU", "onnxruntime": "1.2", "load_average_1min": 0.5},
    "workload": {"prompt_tokens": 128, "repeats": 9},
}


def test_the_verdict_names_what_beats_pruning(page: ModuleType) -> None:
    assert page.verdict(RECORD) == (
        "Speed beside quality: In fp32 dense w4 beats every pruned model. "
        "In w4 pruning is on the frontier at 20%."
    )


def test_the_section_is_the_page_of_the_search_and_where_it_was_timed(page: ModuleType) -> None:
    lines = page.section(RECORD).splitlines()
    assert lines[0].startswith("| Point | KL to dense |") and lines[1].count("|") == lines[0].count("|")
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| dense", "| s0.2", "| dense-w4", "| s0.2-w4"]
    assert "4.00 ms" in lines[4] and lines[4].endswith("| 1.00 MB | recommended |")
    assert "9 rounds in turns, 2 threads of a CPU" in lines[-1] and "0.5" in lines[-1]


def test_the_picture_has_a_line_for_each_precision(page: ModuleType, tmp_path: Path) -> None:
    page.draw(RECORD, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
