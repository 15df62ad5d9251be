"""What a job costs, read from its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from builders.scripts import ROOT, script


@pytest.fixture
def job_cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script("job_cost")


def test_the_job_is_that_of_the_makefile(job_cost: ModuleType) -> None:
    words = job_cost.demo_words()
    assert words[:2] == ["prune-export", "smollm2"]
    assert f"nirvana-deploy {' '.join(words)} --out demo" in (ROOT / "Makefile").read_text()


def test_stages_are_read_and_added_up(job_cost: ModuleType, tmp_path: Path) -> None:
    stages = {
        "score": {"seconds": 2.0, "cpu_seconds": 3.0, "peak_rss_bytes": 5_000_000, "files": {}},
        "taken": {"seconds": None, "cpu_seconds": None, "peak_rss_bytes": None, "files": {}},
        "report": {"seconds": 0.5, "cpu_seconds": 0.25, "peak_rss_bytes": 7_000_000, "files": {}},
    }
    (tmp_path / "manifest.json").write_text(json.dumps({"environment": {"torch": "2"}, "stages": stages}))
    found = job_cost.cost_of(tmp_path)
    assert list(found["stages"]) == ["score", "report"]
    lines = job_cost.table({"one": found, "other": {"stages": {"score": found["stages"]["score"]}}})
    assert "| score | 2.0 | 3.0 | 5.00 MB | 2.0 | 3.0 | 5.00 MB |" in lines
    assert "| report | 0.5 | 0.2 | 7.00 MB | | | |" in lines
    assert "| all | 2.5 | 3.2 | 7.00 MB | 2.0 | 3.0 | 5.00 MB |" in lines
