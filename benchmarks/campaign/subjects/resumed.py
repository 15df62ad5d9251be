"""Resumed bytes: files of a finished folder are damaged or lost, and --resume makes the same bytes again."""

from __future__ import annotations

from random import Random

from campaign.mutations import damage_bytes
from campaign.subject import Result
from campaign.subjects.kills import INPUTS, JOB
from campaign.trial import run
from campaign.world import World, differing, missing, temporaries

UNIT = "damaged folders"
_NOT_THESE = ("manifest.json",)
"""Without its manifest a folder is nobody's; hostile.py damages it."""


def trial(world: World, random: Random) -> Result:
    """One to three files are damaged or lost; ``verify`` notices, and resuming repairs."""
    with world.folder(*INPUTS, "out") as folder:
        out = folder / "out"
        files = sorted(path for path in out.rglob("*") if path.is_file() and path.name not in _NOT_THESE)
        said = []
        for file in random.sample(
            [file for file in files if not file.name.startswith(".")], random.randint(1, 3)
        ):
            said.append(f"{file.relative_to(out)} {damage_bytes(file, random)}")
        noticed = run("verify", "out", folder=folder)
        complaints = [f"verify: {one}" for one in noticed.complaints(allowed=frozenset({3}))]
        ended = run(*JOB, "--resume", folder=folder)
        complaints += ended.complaints(allowed=frozenset({0}))
        complaints += (
            differing(out, world.made("out")) + missing(out, world.made("out")) + temporaries(folder)
        )
        return Result(", ".join(said), complaints, output=noticed.stderr + ended.stderr)
