"""Odd options: command lines that hypothesis draws from the tables of the commands themselves.

A new command or option joins by itself. Each line is a short job of the command with odd options behind it,
or odd through and through.
"""

from __future__ import annotations

import signal
from pathlib import Path
from random import Random
from typing import Any

import click

from campaign.subject import Result
from campaign.trial import run
from campaign.world import SHORT, World, changes, snapshot

UNIT = "odd command lines"
_INPUTS = ("llama", "text.txt", "recipe.toml", "tasks.jsonl", "onnx", "out")
_SHORT = " ".join(SHORT)
_JOBS = {
    "prune-export": f"llama {_SHORT} --calib text.txt --out new --no-benchmark",
    "recipe": f"llama {_SHORT} --calib text.txt",
    "prune": f"llama {_SHORT} --calib text.txt --out new",
    "select-calib": "llama --sparsity 0.3 --num-sequences 4 --seq-len 16 --calib text.txt",
    "export": "llama --out new",
    "quantize": "onnx --scheme w8 --out new",
    "build-engine": "onnx --max-length 64 --out new",
    "verify": "out",
    "benchmark": "out --prompt-tokens 4 --new-tokens 2 --repeats 1",
    "evaluate": "out --eval-text text.txt",
    "generate": "onnx --prompt One --max-new-tokens 2",
    "serve": "onnx --port 0",
    "package": "out --triton --out new",
    "report": "out",
    "inspect": "out",
}
"""Command -> arguments and options of a short job."""
_ENDING = (8.0, signal.SIGTERM)
"""Seconds after which a server is told to end."""
_SHORT_ALONE = {"repeats", "new_tokens", "max_new_tokens", "candidates", "timing_cache"}
"""Options whose large values ask for work without end: these take the small ones."""
# fmt: off
_NUMBERS = ("0", "-1", "1", "2", "3", "0.5", "1e400", "-0", "nan", "inf", "", " ", "1_0", "0x10", "\u0663",
            "1e3", "--", "a")
_HUGE = ("2147483648", "9223372036854775808", "1" + "0" * 30, "1" * 5000)
_TEXTS = ("", " ", "a", "a,b", "x:1", "x:nan,y:-1", ":", ",", "auto", "auto,auto", "\x1b[2J", "\n",
          "\xe9" * 200, "../..", "-h", "{{ 1 }}", "none", "sm89", "sm0,sm99", "\udcff", "nirvana,",
          "pydoc:0.5", "w9=x")
_PLACES = (*_INPUTS, "new", "nowhere", "nowhere/deep/er", "", ".", "..", "/", "-", "~", "/dev/null",
           "/dev/full", "llama/config.json", "llama/new", "out/plan.json", "out/onnx", "new/new", "x" * 300,
           "out/new",
           "a\nb", "onnx/model.onnx", "/proc/self/mem", "\udcff", "onnx/..", "llama.gguf", "a/b")
# fmt: on


def trial(world: World, random: Random) -> Result:
    """One command line."""
    words = _drawn(random)
    with world.folder(*_INPUTS) as folder:
        before = snapshot(folder)
        ended = run(*words, folder=folder, kill=_ENDING if words[0] == "serve" else None)
        after = snapshot(folder)
        written = {word.partition("/")[0] for word in words} | {"new", "out", "llama-s0.3"}
        kept = {name: state for name, state in before.items() if not name.startswith("out")}
        strays = [name for name in after.keys() - before.keys() if Path(name).parts[0] not in written]
        complaints = ended.complaints() + changes(kept, {name: after.get(name, ()) for name in kept})
        complaints += [f"written: {', '.join(strays[:3])}"] if strays else []
        return Result(repr(words), complaints + world.strays(), output=ended.stderr)


def _drawn(random: Random) -> list[str]:
    """A command line, by hypothesis."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    found: list[list[str]] = []

    @seed(random.getrandbits(64))
    @settings(
        max_examples=2,  # the first is the simplest there is
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_command_lines())
    def draw(words: list[str]) -> None:
        found.append(words)

    draw()
    return found[-1]


def _command_lines() -> Any:
    from hypothesis import strategies as st

    from nirvana_deploy.cli.main import commands

    context = click.Context(commands)
    table = {name: commands.get_command(context, name) for name in commands.list_commands(context)}

    @st.composite
    def line(draw: Any) -> list[str]:
        name = draw(st.sampled_from(sorted(table)))
        command = table[name]
        assert command is not None
        words = [name]
        options = [one for one in command.params if isinstance(one, click.Option)]
        if name in _JOBS and draw(st.integers(0, 3)):
            words += _JOBS[name].split()
        else:
            for argument in command.params:
                if isinstance(argument, click.Argument):
                    words += draw(st.lists(_values(argument), max_size=2))
        for option in draw(st.lists(st.sampled_from(options), max_size=3)) if options else []:
            words.append(draw(st.sampled_from([*option.opts, *option.secondary_opts])))
            if not option.is_flag:
                words.append(draw(_values(option)))
        return words

    return line()


def _values(parameter: click.Parameter) -> Any:
    """Values of a parameter, allowed ones and others."""
    from hypothesis import strategies as st

    kind = parameter.type
    if isinstance(kind, click.Choice):
        return st.sampled_from([*kind.choices, *kind.choices, *_TEXTS[:8]])
    if isinstance(kind, click.Path):
        return st.sampled_from(_PLACES)
    if kind.name == "text":
        return st.sampled_from(_TEXTS + _PLACES) | st.text(max_size=20).filter(lambda text: "\0" not in text)
    return st.sampled_from(_NUMBERS if parameter.name in _SHORT_ALONE else _NUMBERS + _HUGE)
