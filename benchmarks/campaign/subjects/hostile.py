"""Hostile files: every file that a command reads, damaged in every way of mutations.py."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from campaign.mutations import damage
from campaign.subject import Result
from campaign.subjects.kills import SEARCH
from campaign.trial import run
from campaign.world import INPUTS, SHORT, World, changes, snapshot

UNIT = "bad inputs"
_SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_GRAPH = ("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json")
_RECORDS = ("manifest.json", "plan.json", "quality.json", "answers.json", "recipe.toml")
_STATES = ("manifest.json", "plan.json", "calibration.safetensors", "scores.safetensors")
_SHORT = " ".join(SHORT) + " --out new"


def _in(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


_MODEL = _in("llama", *_SETTINGS, "model.safetensors")
_INDEX = _in("sharded", "model.safetensors.index.json")
_OUT = _in("out", "manifest.json", *_in("onnx", *_GRAPH))
_SEARCHED = _in("searched", "manifest.json", "points", *_in("s0.2", "manifest.json", "quality.json"))
READS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("export llama --out new", _MODEL),
    ("export sharded --out new", _INDEX),
    ("export llama.gguf --out new", ("llama.gguf",)),
    ("package llama --gguf --out new", _MODEL),
    ("generate llama --prompt One --max-new-tokens 2", _MODEL),
    (f"prune llama --calib text.txt {_SHORT}", (*_MODEL, "text.txt")),
    (f"prune llama --calib lines.jsonl {_SHORT}", ("lines.jsonl",)),
    (f"prune sharded --calib text.txt {_SHORT}", _INDEX),
    ("prune llama --plan out/plan.json --out new", ("out/plan.json",)),
    ("recipe --recipe recipe.toml", ("recipe.toml",)),
    ("prune-export --recipe recipe.toml --dry-run", ("recipe.toml",)),
    ("prune-export --recipe recipe.toml --out out --resume", _in("out", *_STATES)),
    (f"{' '.join(SEARCH[:-1])} searched --resume", _SEARCHED),
    ("inspect out", _in("out", *_RECORDS)),
    ("report out", _in("out", *_RECORDS)),
    ("verify out", (*_OUT, *_in("out", "checkpoint/config.json", "onnx-int8/quantization.json"))),
    ("evaluate out --eval-text text.txt", (*_OUT, "text.txt", "out/calibration.safetensors")),
    ("evaluate out --tasks tasks.jsonl", ("tasks.jsonl",)),
    ("package out --triton", _OUT),
    ("package out --gguf", _in("out", "manifest.json", *_in("checkpoint", *_SETTINGS))),
    ("quantize out --scheme w8", _OUT),
    ("quantize onnx --scheme w4 --out new", _in("onnx", *_GRAPH)),
    ("quantize onnx --scheme int8 --calib text.txt --out new", ("onnx/model.onnx", "text.txt")),
    ("generate onnx --prompt One --max-new-tokens 2", _in("onnx", *_GRAPH)),
    ("verify onnx --checkpoint llama", (*_in("onnx", *_GRAPH), "llama/model.safetensors")),
    ("build-engine onnx --max-length 64 --out new", _in("onnx", *_GRAPH)),
    ("inspect engine/onnx.engine", ("engine/onnx.engine", "engine/onnx.json")),
)
"""Command -> the files that it reads, or a folder of them; a new reader joins with a row."""


def written_by(words: Sequence[str]) -> str:
    """The folder that a command may write."""
    return words[words.index("--out") + 1] if "--out" in words else "out"


def inputs_of(command: str) -> tuple[str, ...]:
    """The inputs that a command line names, and those that its recipe does."""
    named = {word.partition("/")[0] for word in command.split()}
    if "recipe.toml" in named:
        named |= {"llama", "text.txt"}
    return tuple(name for name in INPUTS if name in named)


def trial(world: World, random: Random) -> Result:
    """One command that reads one damaged file; before the first such trial, with the files as they are."""
    command, files = random.choice(READS)
    words = command.split()
    out = written_by(words)
    if complaints := world.without_damage(command, inputs_of(command)):
        return Result(f"nothing damaged; {command}", complaints)
    with world.folder(*inputs_of(command)) as folder:
        file = folder / random.choice(files)
        if file.is_dir():
            file = random.choice(sorted(file.iterdir()))
        how = damage(file, random)
        before = snapshot(folder, without=(out,))
        ended = run(*words, folder=folder)
        complaints = ended.complaints() + changes(before, snapshot(folder, without=(out,))) + world.strays()
        said = f"{file.relative_to(folder)}: {how}; {command}"
        return Result(said, complaints, output=ended.stderr)
