from __future__ import annotations

from dataclasses import replace

import pytest

from nirvana_deploy.base.progress import SILENT
from nirvana_deploy.measure import benchmark
from nirvana_deploy.measure.bounds import Phase
from nirvana_deploy.measure.recipe import Analysis, Workload
from nirvana_deploy.measure.roofline import explained
from nirvana_deploy.measure.roofline.bound import bounded, outrun, raised, roof_of
from nirvana_deploy.measure.roofline.ceilings import Ceilings

CEILINGS = Ceilings(
    threads=2,
    read_gb_per_s=10.0,
    copy_gb_per_s=8.0,
    gop_per_s={"float32": 100.0, "integer": 400.0},
    measured_at="2026-01-01T00:00:00+00:00",
)
STEP = Phase(
    weight_bytes=60e6,
    cache_read_bytes=30e6,
    cache_written_bytes=8e6,
    logits_bytes=2e6,
    operations={"float32": 100e6, "integer": 400e6},
)


def test_a_step_that_moves_many_bytes_is_bound_by_memory() -> None:
    found = bounded(STEP, 40.0, roof_of(CEILINGS, []))
    assert found["moved_bytes"] == 100e6
    assert (found["memory_ms"], found["products_ms"]) == (pytest.approx(10), pytest.approx(1 + 1))
    assert (found["bound_ms"], found["share_of_bound"]) == (pytest.approx(10), pytest.approx(0.25))
    assert found["operations_per_byte"] == 5
    assert (found["gop_per_s"], found["gb_per_s"]) == (pytest.approx(12.5), pytest.approx(2.5))


def test_many_operations_are_bound_by_products() -> None:
    many = replace(STEP, operations={"float32": 2e9, "integer": 4e9})
    found = bounded(many, 60.0, roof_of(CEILINGS, []))
    assert (found["bound_ms"], found["share_of_bound"]) == (pytest.approx(30), pytest.approx(0.5))


def test_memory_counts_as_it_was_between_the_rounds() -> None:
    roof = roof_of(CEILINGS, [4.0, 5.0, 40.0])
    assert bounded(STEP, 40.0, roof)["share_of_bound"] == pytest.approx(0.5)
    assert roof.record()["memory_gb_per_s"] == 5.0
    assert roof.record()["read_gb_per_s"] == 10.0


def test_a_pass_faster_than_its_machine_raises_the_ceilings() -> None:
    float_only = replace(STEP, operations={"float32": 800e6})
    passes = [(float_only, 4.0), (STEP, 5.0)]  # 200e9 a second, and 20e9 bytes
    assert outrun(CEILINGS, passes) and not outrun(CEILINGS, [(float_only, 40.0), (STEP, 5.0)])
    roof = raised(roof_of(CEILINGS, []), passes)
    assert roof.ceilings.gop_per_s == CEILINGS.gop_per_s | {"float32": pytest.approx(200)}
    assert roof.memory_gb_per_s == pytest.approx(25)
    shares = [bounded(*one, roof)["share_of_bound"] for one in passes]
    assert max(shares) == pytest.approx(1)


def test_products_without_a_rate_have_no_bound() -> None:
    found = bounded(replace(STEP, operations={"bfloat16": 1e9}), 40.0, roof_of(CEILINGS, []))
    assert found["bound_ms"] is found["share_of_bound"] is found["products_ms"] is None


def test_ceilings_are_measured_once_the_machine_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(explained, "wait_until_idle", lambda **_: calls.append("waited"))
    monkeypatch.setattr(explained, "machine_ceilings", lambda **_: calls.append("measured"))
    for workload in (Workload(wait_until_idle=True), Workload()):
        explained.Explained(workload, Analysis(), None, SILENT)
    explained.Explained(Workload(wait_until_idle=True), Analysis(), "torch", SILENT)
    assert calls == ["waited", "measured", "measured", "waited"]
    assert not hasattr(benchmark, "wait_until_idle")  # so nothing waits twice
