"""Parallel writers: several commands begin to write into one folder at the same moment.

One gets through; the others do as well or are refused with a sentence that names who writes. No record is
lost: what stood in the manifest and what the commands that got through made is there, and verify passes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from campaign.subject import Result
from campaign.trial import Outcome, finished, run, start
from campaign.world import SHORT, World, temporaries

UNIT = "parallel-writer trials"
_WRITERS = {
    "report out": "report",
    "evaluate out --eval-text text.txt": "quality",
    "evaluate out --tasks tasks.jsonl": "tasks",
    "package out --gguf": "gguf-f16",
    "package out --triton": "triton",
    "quantize out --scheme w8": "onnx-w8",
    "build-engine out --max-length 64": "engine-pruned",
    "prune-export --recipe recipe.toml --out out --resume": "verify",
}
"""Command -> the stage of the manifest that it writes."""
_NEW = f"prune llama --calib text.txt {' '.join(SHORT)} --out out"


def trial(world: World, random: Random) -> Result:
    """Three commands at once, on a finished folder or on none."""
    fresh = random.random() < 0.2
    commands = [_NEW] * 3 if fresh else random.sample(sorted(_WRITERS), 3)
    inputs = ("llama", "text.txt") if fresh else ("llama", "text.txt", "recipe.toml", "tasks.jsonl", "out")
    with world.folder(*inputs) as folder:
        before = set() if fresh else _stages(folder)
        ended = list(zip(commands, _at_once(commands, folder, random), strict=True))
        complaints = []
        for command, outcome in ended:
            complaints += [f"{command}: {one}" for one in outcome.complaints(allowed=frozenset({0, 1}))]
            if outcome.code == 1 and "is being written by" not in outcome.stderr and not fresh:
                complaints.append(f"{command}: refused for another reason")
        through = [command for command, outcome in ended if outcome.code == 0]
        if not through or (fresh and len(through) > 1):
            complaints.append(f"{len(through)} commands got through")
        wanted = before.union(_WRITERS[command] for command in through if not fresh)
        if lost := wanted - _stages(folder):
            complaints.append(f"lost: {', '.join(sorted(lost))}")
        if not fresh:
            verified = run("verify", "out", folder=folder)
            complaints += [f"verify: {one}" for one in verified.complaints(allowed=frozenset({0}))]
        said = "; ".join(f"{command} -> {outcome.code}" for command, outcome in ended)
        errors = "".join(outcome.stderr for _, outcome in ended)
        return Result(said, complaints + temporaries(folder), output=errors)


def _stages(folder: Path) -> set[str]:
    return set(json.loads((folder / "out/manifest.json").read_bytes())["stages"])


def _at_once(commands: list[str], folder: Path, random: Random) -> list[Outcome]:
    begin = time.monotonic() + 0.3
    pids = []
    for number, command in enumerate(commands):
        pids.append(start(_later(command, begin + random.uniform(0, 0.4)), folder=folder, name=f"{number}."))
    return [
        finished(pid, begin, folder=folder, name=f"{number}.", words=tuple(commands[number].split()))
        for number, pid in enumerate(pids)
    ]


def _later(command: str, moment: float) -> Callable[[], None]:
    def work() -> None:
        from nirvana_deploy.cli.main import main

        sys.argv = ["nirvana-deploy", *command.split()]
        time.sleep(max(0, moment - time.monotonic()))
        main()

    return work
