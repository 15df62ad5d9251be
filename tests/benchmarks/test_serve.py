"""The load of benchmarks/serve.py on a server of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.extras import needs
from builders.scripts import script

for module in ("fastapi", "uvicorn", "prometheus_client", "openai"):
    needs(module)


@pytest.mark.parametrize(
    "seconds", [pytest.param(5, marks=pytest.mark.integration), pytest.param(600, marks=pytest.mark.slow)]
)
def test_under_load_nothing_is_lost_and_memory_stays_flat(seconds: int, tmp_path: Path) -> None:
    from builders.serving import write_served

    load = script("serve")
    found = load.under_load(write_served(tmp_path), clients=16, slots=4, seconds=seconds)
    assert found["requests"] >= seconds and found["failed"] == 0
    assert found["descriptors"]["after"] <= found["descriptors"]["begin"]
    if seconds > 60:
        assert load.broken(found) == []


def test_a_broken_promise_is_told() -> None:
    run = {
        "failed": 2,
        "requests": 9,
        "rss_bytes": {"early": 100, "late": 106},
        "descriptors": {"begin": 10, "after": 12},
    }
    assert script("serve").broken(run) == [
        "2 of 9 requests failed",
        "memory grew by 6.0%",
        "2 descriptors stayed open",
    ]
