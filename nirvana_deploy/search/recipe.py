"""Options for a search, and for a job that is given a budget instead of a sparsity."""

from __future__ import annotations

from typing import Annotated

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.recipe import Option, fields_of, recipe, share_of
from nirvana_deploy.base.units import typed_bytes
from nirvana_deploy.quantize.schemes import onnx_schemes

FLOAT = "none"
"""The precision of a model that is not quantized."""


@recipe
class Target:
    """What the deployed model must meet."""

    max_kl: Annotated[
        float | None,
        Option(
            "KL to the dense model of at most this, nats per token, on held-out text or on --eval-text.",
            minimum=0,
        ),
    ] = None
    max_perplexity_ratio: Annotated[
        float | None,
        Option(
            "Perplexity of at most this many times the dense model's, on the worst kind of text.", minimum=1
        ),
    ] = None
    target_tpot_ms: Annotated[
        float | None, Option("Milliseconds of at most this for a decoded token.", minimum=0)
    ] = None
    min_speedup: Annotated[
        float | None, Option("Decoding at least this many times as fast as the dense model.", minimum=0)
    ] = None
    max_weights_bytes: Annotated[
        int | None, Option("Weight file of at most this, for example 300MB.", minimum=1, size=True)
    ] = None

    @property
    def asked(self) -> dict[str, float]:
        """The limits that were given, by name."""
        limits = {field.name: getattr(self, field.name) for field in fields_of(type(self))}
        return {name: limit for name, limit in limits.items() if limit is not None}

    @property
    def typed(self) -> dict[str, str]:
        """The limits that were given as they are typed, by option: {"--max-weights-bytes": "300MB"}."""
        fields = {field.name: field.option.size for field in fields_of(type(self))}
        return {
            f"--{name.replace('_', '-')}": typed_bytes(int(limit)) if fields[name] else f"{limit:g}"
            for name, limit in self.asked.items()
        }

    @property
    def on_quality(self) -> bool:
        """Whether quality is limited."""
        return not {"max_kl", "max_perplexity_ratio"}.isdisjoint(self.asked)

    @property
    def on_time(self) -> bool:
        """Whether decoding is timed against a limit."""
        return not {"target_tpot_ms", "min_speedup"}.isdisjoint(self.asked)


@recipe
class Where:
    """Where pieces of work that do not depend on each other are done."""

    processes: Annotated[int, Option("Cuts made at the same time.", minimum=1, resumable=True)] = 1
    cluster: Annotated[
        str | None,
        Option(
            "Make cuts on a Ray cluster: auto, HOST:PORT or ray://HOST:PORT. Its nodes see the same files.",
            resumable=True,
        ),
    ] = None
    cpus_per_cut: Annotated[
        int | None,
        Option(
            "CPUs, and threads, of each cut where several are made at a time. "
            "[1 on a cluster, else an equal part]",
            minimum=1,
            resumable=True,
        ),
    ] = None
    gpus_per_cut: Annotated[
        int, Option("GPUs of each cut on a Ray cluster; it sees no other.", minimum=0, resumable=True)
    ] = 0


def require_place(where: Where) -> None:
    """Raise NirvanaError for options of a cluster without one."""
    if where.gpus_per_cut and where.cluster is None:
        raise NirvanaError(
            f"--gpus-per-cut {where.gpus_per_cut} is for a cluster: processes here share all GPUs.",
            hint="Leave it out, or name the cluster: --cluster auto",
        )


@recipe
class Search(Where):
    """Which points to try, and where."""

    sparsities: Annotated[
        str, Option("Sparsities to try, separated by commas; 0 is the dense model.", flag="--sparsity")
    ] = "0,0.1,0.2,0.3,0.4,0.5"
    precisions: Annotated[
        str,
        Option("Precisions to try, separated by commas: none, int8, w8, w4.", flag="--precision"),
    ] = "none,int8,w4"
    ways: Annotated[
        tuple[str, ...],
        Option(
            "Cut each sparsity in this way too: options of the cut, its calibration or its recovery that "
            "replace those of the search, as 'saliency=nirvana allocation=global'. Repeat it for more.",
            flag="--try",
            metavar="'OPTION=VALUE ...'",
        ),
    ] = ()
    tasks: Annotated[
        str | None,
        Option(
            "Zero-shot accuracy of the points that are timed, on these tasks: .jsonl files as evaluate takes "
            "them, or folders of them, separated by commas."
        ),
    ] = None
    limit: Annotated[int | None, Option("Examples per task, from its start. [all]", minimum=1)] = None
    shard: Annotated[
        str | None,
        Option(
            "I/N: make the I-th of N parts alone, for job arrays; copied together, the folders are the "
            "whole, and the same command without it goes on from there."
        ),
    ] = None


def sparsities_of(recipe: Search) -> tuple[float, ...]:
    """The sparsities, ascending; raises NirvanaError for what is none, and where nothing is to be cut."""
    found = set()
    for word in _words("--sparsity", recipe.sparsities):
        try:
            value = share_of(word)
        except ValueError:
            value = -1.0
        if not 0 <= value < 1:
            raise NirvanaError(
                f"--sparsity {recipe.sparsities}: {word!r} is none; each is a number from 0 to below 1.",
                hint="For example --sparsity 0,0.1,0.2,0.4",
            )
        found.add(value)
    if not any(found):
        raise NirvanaError(
            f"--sparsity {recipe.sparsities!r} cuts nothing.", hint="For example --sparsity 0,0.1,0.2,0.4"
        )
    return tuple(sorted(found))


def precisions_of(recipe: Search) -> tuple[str | None, ...]:
    """The schemes, None for float weights, as given; raises NirvanaError for a name that is none."""
    known = (FLOAT, *onnx_schemes())
    words = list(dict.fromkeys(_words("--precision", recipe.precisions)))
    for word in words:
        if word not in known:
            raise NirvanaError(
                f"--precision {recipe.precisions}: {word!r} is no precision; there are {', '.join(known)}."
            )
    return tuple(None if word == FLOAT else word for word in words)


def shard_of(recipe: Search) -> tuple[int, int]:
    """(which part, of how many), counted from 0; raises NirvanaError for anything but I/N."""
    if recipe.shard is None:
        return 0, 1
    part, _, parts = recipe.shard.partition("/")
    if part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts):
        return int(part) - 1, int(parts)
    raise NirvanaError(f"--shard {recipe.shard!r} is no part; it takes I/N with I from 1 to N, as 2/8.")


def _words(option: str, text: str) -> list[str]:
    """What stands between commas; raises NirvanaError where that is nothing."""
    words = [word.strip() for word in text.split(",")]
    if "" in words:
        empty = "is empty" if len(words) == 1 else "has nothing between two commas, or at an end"
        raise NirvanaError(
            f"{option} {text!r} {empty}.", hint="Values are separated by single commas: --sparsity 0,0.1,0.2"
        )
    return words
