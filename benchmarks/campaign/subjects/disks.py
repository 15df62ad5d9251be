"""Disk sizes: the disk of the output folder is filled, by others, at a random moment of a job.

The disk is a file system in memory of its own. The command ends with a sentence, or gets through; once there
is room again, --resume makes the bytes of an undisturbed run.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from random import Random

from campaign.subject import Result
from campaign.subjects.kills import AFTER, INPUTS, JOBS
from campaign.trial import at_event, run
from campaign.world import World, changes, differing, missing, snapshot, temporaries

UNIT = "full disks"
_DISK_BYTES = 64 << 20
_EVENTS = 160


def why_not() -> str:
    """Why this machine cannot do it; empty if it can."""
    return "" if os.geteuid() == 0 and Path("/proc/mounts").exists() else "mounting a file system needs root"


def trial(world: World, random: Random) -> Result:
    """One command whose disk is full, all but some bytes, from some file on."""
    command = random.choice((*JOBS, *AFTER))
    after = command in AFTER
    with world.folder(*INPUTS, *(["out"] if after else [])) as folder:
        disk, out = folder / "disk", folder / "disk/out"
        words = [str(out) if word == "out" else word for word in command]
        with _mounted(disk):
            if after:
                (folder / "out").rename(folder / "disk-out")
                subprocess.run(["cp", "-a", f"{folder}/disk-out/.", str(out)], check=True)
            before = snapshot(folder, without=("disk",))
            event, room = random.randint(1, _EVENTS), random.choice((0, 0, 1, 4096, 10_000, 100_000))
            said = f"{words[0]}: {room} bytes left from event {event} on"
            ended = run(*words, folder=folder, prepare=at_event(event, disk, lambda: _fill(disk, room)))
            complaints = ended.complaints(allowed=frozenset({0, 1}))
            complaints += changes(before, snapshot(folder, without=("disk",)))
            reference = world.made(JOBS.get(command) or f"with-{AFTER[command]}")
            complaints += differing(out, reference)
            (disk / "others").unlink(missing_ok=True)
            again = run(*words, *([] if after or not out.exists() else ["--resume"]), folder=folder)
            if ended.code or not after:
                complaints += [f"again: {one}" for one in again.complaints(allowed=frozenset({0}))]
            complaints += differing(out, reference) + temporaries(disk)
            complaints += [] if after else missing(out, reference)
        return Result(said, complaints, output=ended.stderr + again.stderr)


def _fill(disk: Path, room: int) -> None:
    """Take all of a disk but ``room`` bytes."""
    with (disk / "others").open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        file.truncate(max(0, file.tell() - room))


class _mounted:  # noqa: N801  read as a word
    """A small file system at a new folder."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __enter__(self) -> None:
        self._place.mkdir()
        size = f"size={_DISK_BYTES}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "campaign", str(self._place)], check=True)

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", str(self._place)], check=True)
