"""Threads by default are no more than a container's CPU quota allows."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import pytest

from nirvana_deploy.base import machine
from nirvana_deploy.base.machine import (
    keep_to_quota,
    peak_rss_bytes,
    reset_peak_rss,
    threads_for_others,
    usable_cores,
    usable_threads,
)

V2 = {"cpu.max": "150000 100000"}
V1 = {"cpu.cfs_quota_us": "150000\n", "cpu.cfs_period_us": "100000\n"}
GROUPS: dict[str, tuple[str, str, dict[str, str], int]] = {
    "version 2": ("0::/box\n", "box", V2, 2),
    "version 2, of a parent": ("0::/box/inner/job\n", "box", V2, 2),
    "version 2, seen from inside": ("0::/\n", ".", V2, 2),
    "version 1": ("4:cpu,cpuacct:/box\n2:memory:/other\n", "cpu,cpuacct/box", V1, 2),
    "version 1, of a parent": ("4:cpu:/box/job\n", "cpu/box", V1, 2),
    "less than a core": ("0::/box\n", "box", {"cpu.max": "5000 100000"}, 1),
    "no limit": ("0::/box\n", "box", {"cpu.max": "max 100000"}, 64),
    "no limit, version 1": ("4:cpu:/box\n", "cpu/box", {**V1, "cpu.cfs_quota_us": "-1"}, 64),
    "more than there are": ("0::/box\n", "box", {"cpu.max": "9900000 100000"}, 64),
    "damaged": ("0::/box\n", "box", {"cpu.max": "many"}, 64),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_quota_of_a_container_limits_the_cores(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, folder, files, cores = GROUPS[name]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    (tmp_path / "groups" / folder).mkdir(parents=True)
    for file, content in files.items():
        (tmp_path / "groups" / folder / file).write_text(content)
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_cores() == cores
    keep_to_quota()
    assert os.environ.pop("OMP_NUM_THREADS", None) == (None if cores == 64 else str(cores))


@pytest.mark.parametrize(
    ("asked", "threads"), [("", 8), ("3", 3), ("2,1", 2), ("64", 8), ("0", 8), ("all", 8)]
)
def test_openmps_variable_limits_every_pool(
    asked: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert usable_threads() == threads
    with threads_for_others(3):
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["OMP_NUM_THREADS"] == asked


def test_no_variable_is_left_where_there_was_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with threads_for_others(1):
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to give memory back")
def test_a_new_peak_begins_without_what_was_freed() -> None:
    pieces = [bytearray(50_000) for _ in range(4_000)]  # too small to be mapped one by one
    held = psutil.Process().memory_info().rss
    del pieces[:-1]  # the last one keeps the heap from shrinking by itself
    reset_peak_rss()
    assert peak_rss_bytes() < held - 150_000_000
