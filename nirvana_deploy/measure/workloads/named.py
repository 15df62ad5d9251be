"""Workloads as files: how long prompts and answers are, how many run together, how many are timed.

Some are embedded, one TOML file each beside this module; any other file is read the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_toml
from nirvana_deploy.base.recipe import Option, make, recipe
from nirvana_deploy.base.registry import look_up

_SUFFIX = ".toml"
_TAKES = "a whole number, a list of them, or { least = N, most = N }"
_LEAST_NEW_TOKENS = 2
"""TPOT is a mean over the tokens behind the first."""
_ROUNDS = 6
"""The fewest whose ratios can show a difference (``rounds/ratios.py``); more would empty a server more often,
since the clients of a round that have nothing left to ask wait for its last answer."""


class Between(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every length from ``least`` to ``most`` is equally likely."""

    least: int
    most: int


Lengths = int | tuple[int, ...] | Between
"""One length; some, equally likely; or all between two."""


@recipe
class WorkloadFile:
    """The keys of a workload's file."""

    about: Annotated[str, Option("One line on what such requests are for.")] = ""
    prompt_tokens: Annotated[Lengths, Option("Lengths of prompts.", takes=_TAKES)]
    new_tokens: Annotated[Lengths, Option("Lengths of answers, in tokens.", takes=_TAKES)]
    batch_size: Annotated[int, Option("Requests that run as one batch.", minimum=1)] = 1
    requests: Annotated[int, Option("Timed requests, a multiple of the batch size.", minimum=1)]
    concurrency: Annotated[
        int | None, Option("Requests open at a time, at a server of the model.", minimum=1)
    ] = None
    seed: Annotated[int, Option("Random seed of lengths and prompts.", minimum=0)] = 0


@dataclass(frozen=True)
class Request:
    """One batched generation: prompts of one length, answers of one length."""

    batch_size: int
    """N."""
    prompt_tokens: int
    """T."""
    new_tokens: int
    seed: int
    index: int
    """With the seed it decides the prompts' tokens."""

    @property
    def sequence_tokens(self) -> int:
        """Prompt and answer of one sequence together."""
        return self.prompt_tokens + self.new_tokens

    @property
    def written_tokens(self) -> int:
        """Tokens of all sequences in the KV cache at the end; the last token is read by nobody."""
        return self.batch_size * (self.sequence_tokens - 1)


@dataclass(frozen=True)
class Round:
    """Requests that the clients of a server send, each the next one as soon as its own is answered."""

    index: int
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class NamedWorkload:
    """A workload, read and checked."""

    name: str
    file: WorkloadFile

    def to_json(self) -> dict[str, Any]:
        """The keys of its file, as JSON has them; ``concurrency`` only where it is said."""
        keys: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self.file))
        return {key: value for key, value in keys.items() if value is not None}

    @property
    def at_a_time(self) -> int:
        """Sequences that the model has at a time: of a batch, or of all clients."""
        return self.file.concurrency or self.file.batch_size

    def timed(self) -> tuple[Request, ...]:
        """The batches, each with lengths drawn by the seed; the same for every model."""
        file = self.file
        prompts, answers = (np.random.default_rng(one) for one in np.random.SeedSequence(file.seed).spawn(2))
        return tuple(
            Request(
                file.batch_size,
                _drawn(file.prompt_tokens, prompts),
                _drawn(file.new_tokens, answers),
                file.seed,
                index,
            )
            for index in range(file.requests // file.batch_size)
        )

    def rounds(self) -> tuple[Round, ...]:
        """The requests of a workload with ``concurrency`` in six turns, or fewer that have one per client."""
        requests = self.timed()
        count = min(_ROUNDS, len(requests) // self.at_a_time)
        ends = [len(requests) * end // count for end in range(count + 1)]
        return tuple(Round(index, requests[first:last]) for index, (first, last) in enumerate(pairwise(ends)))

    def longest(self) -> Request:
        """The longest batch that it may draw, or the longest requests of all clients together."""
        file = self.file
        return Request(
            self.at_a_time, _ends(file.prompt_tokens)[1], _ends(file.new_tokens)[1], file.seed, file.requests
        )

    def warmup_round(self) -> Round:
        """One of the longest requests for each client, with prompts of their own."""
        one = replace(self.longest(), batch_size=1)
        return Round(0, tuple(replace(one, index=one.index + client) for client in range(self.at_a_time)))


def embedded_names() -> tuple[str, ...]:
    """The names of the embedded workloads, sorted."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX)))


def load_workloads(names: Sequence[str]) -> tuple[NamedWorkload, ...]:
    """The workloads called ``names``: embedded ones, several separated by commas, or TOML files.

    Raises NirvanaError for an unknown name, two of one name, and a file that says something impossible.
    """
    loaded = [_load(one) for name in names for one in _split(name)]
    known = [one.name for one in loaded]
    if twice := next((name for name in known if known.count(name) > 1), None):
        raise NirvanaError(f"Two workloads are called {twice!r}, and a result is kept under its name.")
    return tuple(loaded)


def _split(name: str) -> list[str]:
    return [name] if Path(name).exists() else [one.strip() for one in name.split(",")]


def _load(name: str) -> NamedWorkload:
    if not name.endswith(_SUFFIX):
        known = {one: one for one in embedded_names()}
        look_up(name, known, what="workload", hint="A file of your own ends with .toml: --workload mine.toml")
        with resources.as_file(resources.files(__package__) / f"{name}{_SUFFIX}") as path:
            return _checked(name, read_toml(path), name)
    path = Path(name)
    return _checked(path.stem, read_toml(path), str(path))


def _checked(name: str, values: dict[str, Any], where: str) -> NamedWorkload:
    file = make(WorkloadFile, values, where=where)
    for key, lengths, least in (
        ("prompt_tokens", file.prompt_tokens, 1),
        ("new_tokens", file.new_tokens, _LEAST_NEW_TOKENS),
    ):
        if lengths == ():
            raise NirvanaError(f"{where}: {key} is an empty list; it takes {_TAKES}.")
        low, high = _ends(lengths)
        if low < least:
            raise NirvanaError(f"{where}: {key} = {low} is not allowed; it takes at least {least}.")
        if high < low:  # of a list they are in order
            raise NirvanaError(f"{where}: {key} has least = {low} and most = {high}, which is less.")
    _require_clients(file, where)
    if over := file.requests % file.batch_size:
        fewer, more = file.requests - over, file.requests - over + file.batch_size
        rather = f"{fewer} or {more}" if fewer else str(more)
        raise NirvanaError(
            f"{where}: requests = {file.requests} is no multiple of batch_size = {file.batch_size}; "
            f"{rather} would be."
        )
    return NamedWorkload(name, file)


def _require_clients(file: WorkloadFile, where: str) -> None:
    """Raise NirvanaError where clients of a server have batches, or some of them nothing to ask."""
    if file.concurrency is None:
        return
    if file.batch_size != 1:
        raise NirvanaError(
            f"{where}: with concurrency = {file.concurrency} every request stands alone, and the server "
            f"makes the batches: batch_size = {file.batch_size} is not allowed.",
            hint="Leave batch_size out.",
        )
    if file.requests < file.concurrency:
        raise NirvanaError(
            f"{where}: requests = {file.requests} is less than concurrency = {file.concurrency}, so some "
            "clients would have nothing to ask."
        )


def _ends(lengths: Lengths) -> tuple[int, int]:
    """The shortest and the longest."""
    if isinstance(lengths, Between):
        return lengths.least, lengths.most
    several = (lengths,) if isinstance(lengths, int) else lengths
    return min(several), max(several)


def _drawn(lengths: Lengths, random: np.random.Generator) -> int:
    if isinstance(lengths, Between):
        return int(random.integers(lengths.least, lengths.most, endpoint=True))
    return lengths if isinstance(lengths, int) else int(random.choice(lengths))


def require_within_context(where: str, longest: Request, *, context_tokens: int | None, hint: str) -> None:
    """Raise NirvanaError where a sequence would be longer than the model's context, if it has an end."""
    if context_tokens is not None and longest.sequence_tokens > context_tokens:
        raise NirvanaError(
            f"{where}: prompt_tokens = {longest.prompt_tokens} and new_tokens = {longest.new_tokens} make "
            f"{longest.sequence_tokens} tokens, and the model's context is {context_tokens}.",
            hint=hint,
        )
