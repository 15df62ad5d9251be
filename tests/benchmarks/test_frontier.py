"""What counts as worth its cost: arithmetic on invented models."""

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


def model(removed: float, precision: str, ms: float, *perplexities: float) -> dict[str, Any]:
    texts = {kind: {"perplexity": one} for kind, one in zip(("wiki", "code"), perplexities, strict=True)}
    return {
        "removed_share": removed,
        "precision": precision,
        "p50_ms": ms,
        "weights_bytes": 1e6,
        "texts": texts,
    }


DENSE = model(0.0, "fp32", 12.0, 10.0, 20.0)
PRUNED = model(0.2, "fp32", 10.0, 20.0, 40.0)
DENSE_W4 = model(0.0, "w4", 4.0, 11.0, 22.0)
PRUNED_W4 = model(0.2, "w4", 3.0, 20.0, 80.0)
MODELS = [DENSE, PRUNED, DENSE_W4, PRUNED_W4]


def test_the_cost_of_a_model_is_the_geometric_mean_over_kinds_of_text(page: ModuleType) -> None:
    assert page.cost(PRUNED_W4, DENSE) == pytest.approx(8**0.5)


def test_a_model_that_another_beats_in_both_is_not_on_the_frontier(page: ModuleType) -> None:
    best = [page.label(one) for one in page.frontier(MODELS, DENSE)]
    assert best == ["20% removed, w4", "dense w4", "dense fp32"]


def test_the_table_names_the_kind_of_text_that_suffers_most(page: ModuleType, tmp_path: Path) -> None:
    lines = page.table({"models": MODELS}).splitlines()
    assert len(lines) == 2 + len(MODELS)
    assert "| 20% removed, w4 | 3.00 | 4.00 | 1 | 2.83x | 4.00x code | 2.00x | 4.00x | yes |" in lines
    page.draw({"models": MODELS}, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_the_verdict_names_what_beats_pruning(page: ModuleType) -> None:
    said = page.verdict({"models": MODELS})
    assert said == (
        "Speed beside quality: In fp32 dense w4 beats every pruned model. "
        "In w4 pruning is on the frontier at 20%."
    )
