"""Forced: commands with --force on folders and files of this tool's that somebody put files into.

Either the command is refused, or it gets through beside them: every foreign file is there with its bytes. A
target without any is replaced. tests/cli/test_force.py has the targets that are somebody else's altogether.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from campaign.subject import Result
from campaign.subjects.hostile import inputs_of
from campaign.trial import run
from campaign.world import SHORT, World, changes, snapshot, temporaries

UNIT = "forced replacements"
_WRITES = {
    "export llama --out onnx": "onnx",
    "quantize onnx --scheme w8 --out engine": "engine",
    "build-engine onnx --max-length 64 --out engine": "engine",
    "package llama --gguf --out llama.gguf": "llama.gguf",
    "package onnx --triton --out engine": "engine",
    f"prune llama --calib text.txt {' '.join(SHORT)} --out out": "out",
    "prune-export --recipe recipe.toml --out out": "out",
    "quantize out --scheme w8": "out",
    "package out --gguf": "out",
    "package out --triton": "out",
    "build-engine out --max-length 64": "out",
}
"""Command -> what of this tool's it replaces, or writes into."""
_NAMES = (
    "notes.txt", "thesis/chapter.tex", ".hidden", "model.onnx.bak", ".partial-mine", "deep/er/still.txt",
    "onnx/notes.txt", "checkpoint/notes.txt", "engine/pruned.engine", "engine/notes.txt", "gguf/mine.gguf",
    "triton/config.pbtxt", "onnx-w8/model.onnx", "onnx-int8/notes.txt", "plan.json.orig", "onnx.engine",
    "report.md.orig", "dense/notes.txt", "manifest.json~", "tokenizer.model",
)  # fmt: skip


def trial(world: World, random: Random) -> Result:
    """One command, and no foreign file to three of them in what it replaces."""
    command = random.choice(sorted(_WRITES))
    target = _WRITES[command]
    with world.folder(*sorted({*inputs_of(command), target})) as folder:
        place, theirs = folder / target, {}
        if place.is_dir():
            for name in random.sample(_NAMES, random.randint(0, 3)):
                if not (place / name).exists():
                    theirs[place / name] = random.randbytes(40)
        elif random.random() < 0.5:
            theirs[place] = random.randbytes(40)
        for file, data in theirs.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        before = snapshot(folder, without=(target,))
        ended = run(*command.split(), "--force", folder=folder)
        complaints = ended.complaints(allowed=frozenset({0, 1} if theirs else {0}))
        complaints += lost(theirs) + changes(before, snapshot(folder, without=(target,)))
        names = ", ".join(str(file.relative_to(folder)) for file in theirs) or "nothing"
        said = f"{command} --force, with {names} in it -> {ended.code}"
        return Result(said, complaints + temporaries(folder, of=ended.pid), output=ended.stderr)


def lost(theirs: dict[Path, bytes]) -> list[str]:
    """Complaints about files that are gone or hold something else."""
    gone = [file for file, data in theirs.items() if not file.is_file() or file.read_bytes() != data]
    return [f"lost: {file.name}" for file in gone]
