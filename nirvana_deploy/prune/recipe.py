"""Options for the cut."""

from __future__ import annotations

from typing import Annotated, Literal

from nirvana_deploy.base.recipe import Option, recipe
from nirvana_deploy.calibrate.recipe import NumSequences, Seed, source_names

ALLOCATIONS = ("curves", "global", "uniform")
COSTS = ("weights", "bytes", "ms")
PRESETS = ("best", "paper", "fast")
REFIT = "refit"
"""The saliency that is none: units are chosen inside the refit."""
SALIENCY_NAMES = ("nirvana", "nirvana-vocab", "taylor", "wanda-sp", "flap", "magnitude", "random")
"""Those of ``saliency/``, whose import takes a second."""


def _of_a_job() -> tuple[str, ...]:
    return (REFIT, "auto", *SALIENCY_NAMES)


def _of_a_selection() -> tuple[str, ...]:
    return (REFIT, *SALIENCY_NAMES)


Sparsity = Annotated[
    float, Option("Share of the decoder's linear weights to remove, for example 0.4 or 40%.", share=True)
]
Allocation = Annotated[
    str,
    Option(
        "curves: measure what each layer loses and cut where it hurts least; global: rank all units of a "
        "kind; uniform: one shape for all layers (loads in stock transformers and other consumers).",
        choices=ALLOCATIONS,
    ),
]
_ROUND = "Round kept FFN widths to multiples of this"
RoundTo = Annotated[int, Option(f"{_ROUND}.", minimum=1)]


@recipe
class Pruning:
    """How much to remove, and by which rule."""

    sparsity: Sparsity
    preset: Annotated[
        str,
        Option(
            "best: the recipe that measured best; paper: NIRVANA as published; fast: one forward pass and a "
            "quick refit, and fewer windows and tokens to measure on. Options typed beside it win.",
            choices=PRESETS,
        ),
    ] = "best"
    saliency: Annotated[
        str,
        Option(
            "refit: units are chosen inside the refit; or nirvana, nirvana-vocab, taylor, wanda-sp, flap, "
            "magnitude, random; several, separated by commas, or 'auto' (nirvana and taylor) are chosen "
            "among by KL.",
            suggests=_of_a_job,
        ),
    ] = REFIT
    gamma: Annotated[
        float | Literal["auto"] | None,
        Option(
            "MLP sparsity / attention sparsity, or 'auto' to choose by KL. "
            "Not with curves, which decide both. [M/A, the ratio of MLP to attention weights]"
        ),
    ] = None
    allocation: Allocation = "curves"
    round_to: Annotated[
        int | Literal["auto"],
        Option(
            f"{_ROUND}; auto: with curves 32, a block of w4 and of llama.cpp's types, where it is at "
            "most a 24th of a width; else 8.",
            minimum=1,
        ),
    ] = "auto"
    min_groups: Annotated[int, Option("KV groups that every layer keeps, with curves.", minimum=1)] = 1
    min_neurons: Annotated[
        int | None, Option("FFN neurons that every layer keeps, with curves. [a 24th of them]", minimum=1)
    ] = None
    cost: Annotated[
        str,
        Option(
            "What the sparsity is a share of, with curves: linear weights, bytes read for a decoded token, "
            "or its milliseconds, measured in ONNX Runtime here.",
            choices=COSTS,
        ),
    ] = "weights"
    micro_batch: Annotated[
        int, Option("Windows scored at a time; changes memory, not the result.", minimum=1)
    ] = 8
    reconstruct: Annotated[
        bool,
        Option(
            "Refit what the cut leaves of the output projections (o, down) by least squares on the "
            "calibration windows; shapes and speed stay. Wants 20 tokens for each neuron of an FFN.",
            flag="--reconstruct/--no-reconstruct",
        ),
    ] = True
    ridge: Annotated[
        float | Literal["auto"],
        Option("How the refit holds to the old weights; auto: the best of several on held-out windows."),
    ] = "auto"


@recipe
class Selection:
    """Candidates to rank by KL."""

    sparsity: Sparsity
    candidates: Annotated[int, Option("Disjoint calibration sets drawn from each corpus.", minimum=1)] = 8
    corpora: Annotated[
        str,
        Option(
            "Calibration sources to try, separated by commas, as --calib of prune-export takes them.",
            suggests=source_names,
        ),
    ] = "pydoc"
    saliencies: Annotated[
        str,
        Option(
            "Saliencies to try, separated by commas; refit, where units are chosen inside the refit, with "
            "curves or uniform.",
            flag="--saliency",
            suggests=_of_a_selection,
        ),
    ] = "nirvana"
    gammas: Annotated[
        str,
        Option("Numbers or M/A to try, separated by commas, or 'auto' for a small grid.", flag="--gamma"),
    ] = "M/A"
    allocation: Annotated[
        str, Option("How what goes is divided among layers, as for prune-export.", choices=ALLOCATIONS)
    ] = "global"
    reconstruct: Annotated[
        bool,
        Option(
            "Compare the cuts with what stays refitted, as prune-export refits it by default; else plain "
            "ones, which takes less time.",
            flag="--reconstruct/--no-reconstruct",
        ),
    ] = False
    round_to: RoundTo = 8
    num_sequences: NumSequences = 32
    seq_len: Annotated[int, Option("Tokens per window.", minimum=2)] = 128
    seed: Seed = 0
    heldout_sequences: Annotated[
        int, Option("Held-out windows, shared equally among the corpora.", minimum=2)
    ] = 128
    heldout_len: Annotated[int, Option("Tokens per held-out window.", minimum=1)] = 64
