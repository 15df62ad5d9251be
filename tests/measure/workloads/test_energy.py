"""Counters of RAPL, from folders that look like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from nirvana_deploy.measure.workloads.energy import EnergyMeter


def zone(root: Path, name: str, *, called: str, microjoules: int, most: int = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for file, value in (("name", called), ("energy_uj", microjoules), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


def test_packages_and_their_memory_are_summed_and_begin_again_at_the_end(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", called="package-0", microjoules=100)
    memory = zone(tmp_path, "intel-rapl:0:2", called="dram", microjoules=999_000)
    core = zone(tmp_path, "intel-rapl:0:0", called="core", microjoules=5)
    zone(tmp_path, "intel-rapl:1", called="psys", microjoules=7)
    again = zone(tmp_path, "intel-rapl-mmio:0", called="package-0", microjoules=100)
    meter = EnergyMeter(tmp_path)
    assert meter.zones == ("package-0", "dram")
    before = meter.read()
    package.write_text("500100")
    memory.write_text("24000")  # after 1,000,000 it went on from 0
    for other in (core, again):
        other.write_text("900000")
    assert meter.joules(before, meter.read()) == pytest.approx(0.5 + 0.025)


def test_where_nothing_can_be_read_nothing_is_said(tmp_path: Path) -> None:
    """No counters at all; one that is gone, or that its owner has closed, is no zero."""
    assert EnergyMeter(tmp_path / "none").zones == ()
    counter = zone(tmp_path, "intel-rapl:0", called="package-0", microjoules=100)
    meter = EnergyMeter(tmp_path)
    before = meter.read()
    counter.unlink()
    assert before is not None and meter.read() is None and meter.joules(before, meter.read()) is None
    empty = EnergyMeter(tmp_path)
    assert empty.zones == () and empty.read() is None
