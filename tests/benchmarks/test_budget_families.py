"""How nearly budgets are met by family: what a row and a cell say."""

from __future__ import annotations

from types import ModuleType

import pytest
from builders.scripts import ROOT, script

from nirvana_deploy.model.families import FAMILIES


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script("budget_families")


def test_what_is_not_used_up_says_which_cut_comes_next(families: ModuleType) -> None:
    loads = [0.0, 1.4, 0.24, 1.3]
    tried = {"budget": {"max_kl": 0.15}, "load": 0.24, "trials": [{"load": load} for load in loads]}
    near = {"budget": {"max_weights_bytes": 1e5}, "load": 0.988, "trials": tried["trials"]}
    unmet = {"budget": {"target_tpot_ms": 1.0}, "failed": "No sparsity meets it."}
    rows = [families.row_of("qwen3", row) for row in (tried, near, unmet)]
    assert [row["next_load"] for row in rows] == [1.3, 1.3, None]
    assert families.table({"budgets": rows}).splitlines() == [
        "| | `--max-kl` | `--max-weights-bytes` | `--target-tpot-ms` |",
        "|---|--:|--:|--:|",
        "| qwen3 | 0.240, next 1.300 | 0.988 | not met |",
    ]


def test_every_family_is_among_them(families: ModuleType) -> None:
    for name in FAMILIES:
        assert any(name.removesuffix("_text") in kind for kind in families.FAMILIES), name
