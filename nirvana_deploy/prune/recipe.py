"""Options for the cut."""

from __future__ import annotations

from typing import Annotated, Literal

from nirvana_deploy.base.recipe import Option, recipe
from nirvana_deploy.calibrate.recipe import NumSequences, Seed

ALLOCATIONS = ("global", "uniform")
Sparsity = Annotated[float, Option("Share of the decoder's linear weights to remove, for example 0.4.")]
Allocation = Annotated[
    str,
    Option(
        "Layers differ, or all get one shape (loads in stock transformers and other consumers).",
        choices=ALLOCATIONS,
    ),
]
RoundTo = Annotated[int, Option("Round kept FFN widths to multiples of this.", minimum=1)]


@recipe
class Pruning:
    """How much to remove, and by which rule."""

    sparsity: Sparsity
    saliency: Annotated[
        str,
        Option(
            "nirvana, nirvana-vocab, taylor, wanda-sp, flap, magnitude, random; several, separated by "
            "commas, or 'auto' (nirvana and taylor) are chosen among by KL."
        ),
    ] = "nirvana"
    gamma: Annotated[
        float | Literal["auto"] | None,
        Option(
            "MLP sparsity / attention sparsity, or 'auto' to choose by KL. "
            "[M/A, the ratio of MLP to attention weights]"
        ),
    ] = None
    allocation: Allocation = "global"
    round_to: RoundTo = 8
    micro_batch: Annotated[
        int, Option("Windows scored at a time; changes memory, not the result.", minimum=1)
    ] = 8
    reconstruct: Annotated[
        bool,
        Option(
            "Refit what the cut leaves of the output projections (o, down) by least squares on the "
            "calibration windows; shapes and speed stay. Needs as many tokens as the widest FFN has neurons.",
            flag="--reconstruct/--no-reconstruct",
        ),
    ] = False


@recipe
class Selection:
    """Candidates to rank by KL."""

    sparsity: Sparsity
    candidates: Annotated[int, Option("Disjoint calibration sets drawn from each corpus.", minimum=1)] = 8
    corpora: Annotated[
        str,
        Option("Comma-separated: text or .jsonl files, pydoc, self, c4, bookcorpus, wikitext, lambada."),
    ] = "pydoc"
    saliencies: Annotated[str, Option("Comma-separated saliencies to try.", flag="--saliency")] = "nirvana"
    gammas: Annotated[
        str,
        Option("Comma-separated numbers or M/A to try, or 'auto' for a small grid.", flag="--gamma"),
    ] = "M/A"
    allocation: Annotated[str, Option("global or uniform.")] = "global"
    round_to: RoundTo = 8
    num_sequences: NumSequences = 32
    seq_len: Annotated[int, Option("Tokens per window.", minimum=2)] = 128
    seed: Seed = 0
    heldout_sequences: Annotated[
        int, Option("Held-out windows, shared equally among the corpora.", minimum=2)
    ] = 128
    heldout_len: Annotated[int, Option("Tokens per held-out window.", minimum=1)] = 64
