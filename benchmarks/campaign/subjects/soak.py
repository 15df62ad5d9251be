"""Soak: jobs in a row in one process; its memory stays flat within 5 % and no descriptor is lost."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from random import Random
from statistics import median

import psutil

from campaign.subject import Result
from campaign.trial import call
from campaign.world import SHORT, World

UNIT = "runs in one process"
LONG = True
"""One trial does all that is wanted."""
_INPUTS = ("llama", "text.txt")
_GROWTH = 0.05


def trial(world: World, random: Random, runs: int) -> Result:
    """``runs`` jobs; the second fifth of them is compared with the last."""
    with world.folder(*_INPUTS) as folder:
        file = folder / "measured.json"

        def work() -> None:
            file.write_text(json.dumps([_after_a_job(folder) for _ in range(runs)]))

        ended = call(work, folder=folder, limited=False)
        complaints = ended.complaints(allowed=frozenset({0}))
        if not file.exists():
            return Result("no measurement", complaints, output=ended.stderr)
        memory, descriptors = zip(*json.loads(file.read_text()), strict=True)
        fifth = max(1, runs // 5)
        early, late = median(memory[fifth : 2 * fifth] or memory), median(memory[-fifth:])
        if late > early * (1 + _GROWTH):
            complaints.append(f"memory grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB")
        if descriptors[-1] > descriptors[min(fifth, runs - 1)]:
            complaints.append(f"descriptors: {descriptors[min(fifth, runs - 1)]}, then {descriptors[-1]}")
        said = f"{early / 1e6:.1f} MB, then {late / 1e6:.1f} MB; {descriptors[-1]} descriptors"
        return Result(said, complaints, count=runs, output=f"{memory}\n{descriptors}")


def _after_a_job(folder: Path) -> tuple[int, int]:
    """Resident bytes and open descriptors of this process after one more job."""
    from nirvana_deploy.cli.main import commands

    words = ["prune-export", "llama", *SHORT, "--calib", "text.txt", "--out", "new", "--no-benchmark"]
    commands.main([*words, "--no-baseline", "--quantize", "int8"], standalone_mode=False)
    shutil.rmtree(folder / "new")
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds()
