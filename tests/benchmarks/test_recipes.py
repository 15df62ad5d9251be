"""The table of recipes says perplexity and KL; single kinds of text are calibrated on."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from builders.scripts import ROOT


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recipes

    return recipes


def row(seed: int, **kl: float) -> dict[str, Any]:
    texts = {
        name.replace("_", "-"): {"kl": value, "perplexity": 20.0, "dense_perplexity": 10.0}
        for name, value in kl.items()
    }
    return {"recipe": "best", "calib": "prose", "sparsity": 0.2, "seed": seed, "texts": texts}


def test_kl_is_on_test_and_over_all_kinds_but_the_calibrations_own(page: ModuleType) -> None:
    rows = [row(0, test=0.2, code=1.0, held_out=9.0), row(1, test=0.4, code=1.2, held_out=9.0)]
    head, _, line = page.table(rows).splitlines()
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert cells["KL, test"] == "0.30 (0.20-0.40)"
    assert cells["KL, mean of kinds"] == "0.70 (0.60-0.80)"


def test_a_row_without_a_kind_has_no_mean_over_it(page: ModuleType) -> None:
    head, _, *lines = page.table([row(0, test=0.2, code=1.0), row(1, code=1.2)]).splitlines()
    cells = dict(zip(head.split(" | "), lines[0].split(" | "), strict=True))
    assert cells["KL, test"] == "0.20" and cells["KL, mean of kinds"] == "0.60"
