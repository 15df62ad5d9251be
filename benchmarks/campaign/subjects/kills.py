"""Kill points: SIGKILL, SIGTERM and SIGINT at any moment of a job, of packages and of an engine, and again.

A trial is a chain: a command is repeated, with --resume if it has it, and killed at a random event of the
file system or after a random time, until it gets through. After each kill every file under a final name has
the bytes of an undisturbed run, and in the end all of them are there.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from random import Random

from campaign.subject import Result
from campaign.trial import Outcome, at_event, run
from campaign.world import World, changes, differing, missing, snapshot, temporaries

UNIT = "kill points"
INPUTS = ("llama", "text.txt", "recipe.toml")
JOB = ("prune-export", "--recipe", "recipe.toml", "--out", "out")
TRAINED = (
    "--recover",
    "200",
    "--recover-batch",
    "2",
    "--recover-text",
    "text.txt",
    "--learning-rate",
    "0.001",
)
SEARCH = (
    "search",
    "--recipe",
    "recipe.toml",
    "--sparsity",
    "0,0.2,0.4",
    "--precision",
    "none,w8",
    "--max-weights-bytes",
    "1G",
    "--out",
    "out",
)
JOBS = {JOB: "out", (*JOB, *TRAINED): "recovered", SEARCH: "searched"}
"""A whole job -> the input that it makes where nobody disturbs it."""
AFTER = {
    ("package", "out", "--gguf"): "gguf",
    ("package", "out", "--triton"): "triton",
    ("build-engine", "out", "--max-length", "64"): "engine",
}
"""Command on a finished folder -> the folder in it that it makes."""
_ENDS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 130, signal.SIGINT: 130}
"""Signal -> how a command ends by it; SIGTERM is like SIGINT."""
_EVENTS, _SECONDS = 60, 4.0
"""How far into a command a moment lies at most; the next one begins where the last one ended."""
_KILLS = 6


def trial(world: World, random: Random) -> Result:
    """A job from a model, or a package or an engine of a finished one, killed up to six times."""
    command = random.choice((*JOBS, *JOBS, *AFTER))
    said: list[str] = []
    job = world.made(JOBS.get(command, "out"))
    reference = job if command in JOBS else world.made(f"with-{AFTER[command]}")
    with world.folder(*INPUTS, *([] if command in JOBS else ["out"])) as folder:
        before = snapshot(folder, without=("out",))
        for _ in range(_KILLS):
            complaints, ended = _killed(job, command, folder, random, said)
            complaints += differing(folder / "out", reference)
            complaints += changes(before, snapshot(folder, without=("out",)))
            if complaints or not ended.code:
                break
        else:
            ended = run(*_again(command, folder), folder=folder)
            complaints = ended.complaints(allowed=frozenset({0}))
        complaints += missing(folder / "out", reference)
        complaints += temporaries(folder) if not ended.code else []
        kills = ", ".join(said) or "none"
        return Result(f"{' '.join(command)}: {kills}", complaints, len(said), ended.stderr)


def _again(command: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """The command as its user repeats it."""
    if command in JOBS:
        return (*command, "--resume") if (folder / "out/manifest.json").is_file() else command
    return (*command, "--force") if (folder / "out" / AFTER[command]).exists() else command


def _killed(
    job: Path, command: tuple[str, ...], folder: Path, random: Random, said: list[str]
) -> tuple[list[str], Outcome]:
    """Run ``command`` and kill it; what is wrong with what it left, and how it ended."""
    words, number = _again(command, folder), random.choice(list(_ENDS))
    if random.random() < 0.7:
        event = random.randint(1, _EVENTS)
        moment = f"{number.name} at event {event}"
        kill = at_event(event, folder, lambda: os.kill(os.getpid(), number))
        ended = run(*words, folder=folder, prepare=kill)
    else:
        seconds = random.uniform(0.3, _SECONDS)
        moment = f"{number.name} after {seconds:.2f} s"
        ended = run(*words, folder=folder, kill=(seconds, number))
    complaints = ended.complaints(allowed=frozenset({0, _ENDS[number]}))
    if ended.code:
        said.append(moment)
        complaints += temporaries(folder, of=ended.pid) if number is not signal.SIGKILL else []
        if random.random() < 0.2 and (folder / "out/manifest.json").is_file():
            complaints += _verified(folder, job)
    return complaints, ended


def _verified(folder: Path, job: Path) -> list[str]:
    """What ``verify`` says of what a kill left: that a job is whole only if it is."""
    said = run("verify", "out", folder=folder)
    allowed = {3} if missing(folder / "out", job) else {0, 3}
    return [f"verify: {one}" for one in said.complaints(allowed=frozenset(allowed))]
