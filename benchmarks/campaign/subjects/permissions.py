"""Permissions: files and folders that a command reads or writes and may not.

As root, the command gives up the right to ignore them first.
"""

from __future__ import annotations

from random import Random

from campaign.subject import Result
from campaign.subjects.hostile import READS, inputs_of
from campaign.trial import obey_permissions, run
from campaign.world import World, changes, snapshot

UNIT = "forbidden places"
_OF_FILES, _OF_FOLDERS = (0o000, 0o200, 0o400), (0o000, 0o300, 0o500, 0o600)


def trial(world: World, random: Random) -> Result:
    """One command, and one or two places whose modes forbid something."""
    command, files = random.choice(READS)
    inputs = inputs_of(command)
    with world.folder(*inputs) as folder:
        places = sorted({*(folder / file for file in files), *(folder / file for file in inputs), folder})
        places += sorted(path for path in folder.glob("out/*"))
        said = []
        for place in random.sample(places, random.randint(1, 2)):
            mode = random.choice(_OF_FOLDERS if place.is_dir() else _OF_FILES)
            said.append(f"{place.relative_to(folder)} {mode:o}")
            place.chmod(mode)
        written = ("out", "new", "searched")
        before = snapshot(folder, without=written)
        ended = run(*command.split(), folder=folder, prepare=obey_permissions)
        complaints = ended.complaints() + changes(before, snapshot(folder, without=written))
        folder.chmod(0o700)
        return Result(f"{', '.join(said)}; {command}", complaints + world.strays(), output=ended.stderr)
