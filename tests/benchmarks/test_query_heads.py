"""Query heads as units, on a tiny model: the same curves where no head goes, never a worse plan."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from builders.scripts import ROOT
from builders.tiny import VOCABULARY, write_tiny

from nirvana_deploy.model.checkpoint import Checkpoint


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import query_heads

    return query_heads


def test_heads_add_options_and_never_a_worse_plan(page: ModuleType, tmp_path: Path) -> None:
    dense = Checkpoint.open(write_tiny(tmp_path, "llama-tied"))
    windows = np.random.default_rng(0).integers(3, VOCABULARY, size=(12, 16))
    curves, attentions = page.measured(dense, windows)
    heads = dense.shape.query_heads_per_group
    for options, curve in zip(attentions, curves.groups, strict=True):
        whole = sorted((o for o in options if o.heads == heads), key=lambda o: -o.groups)
        np.testing.assert_allclose([o.loss for o in whole], curve.kl, rtol=1e-9, atol=1e-15)
        assert len(options) == len(whole) * heads
        assert all(o.loss > 0 for o in options if o.removed)
    rows = [page.compared(dense.shape, curves, attentions, share) for share in (0.1, 0.3)]
    assert all(row["heads_kl"] <= row["groups_kl"] * (1 + 1e-9) for row in rows)
    assert len(page.table(rows).splitlines()) == 4
