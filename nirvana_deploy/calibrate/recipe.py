"""Options for calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nirvana_deploy.base.recipe import Option, recipe


def source_names() -> tuple[str, ...]:
    """What ``calib`` may name, files apart."""
    import nirvana_deploy.calib_sets as calib_sets

    return ("mix", "auto", "prose", "self", "pydoc", "code", *calib_sets.names())


NumSequences = Annotated[int, Option("Number of calibration windows.", minimum=1)]
Seed = Annotated[int, Option("Random seed for sampling calibration windows.", minimum=0)]


@recipe
class Calibration:
    """Text for scoring, and text for measuring quality."""

    calib: Annotated[
        str,
        Option(
            "Calibration text: a file (text, JSON, JSON lines, CSV, parquet; chats, packed ones), "
            "prose (of many kinds, in the package), pydoc, code (Python's own), self (the model writes), "
            "c4, bookcorpus, wikitext, lambada; with shares, a mixture (pydoc:0.7,code:0.3), or 'mix' of "
            "prose, self, pydoc and code; several without shares, or 'auto' (pydoc, self), are chosen among "
            "by KL.",
            suggests=source_names,
        ),
    ] = "mix"
    candidates: Annotated[
        int | None,
        Option("Calibration sets drawn from each source to choose among. [4 for auto, else 1]", minimum=1),
    ] = None
    num_sequences: Annotated[
        int | None,
        Option(
            "Number of calibration windows. [20 tokens for each neuron of an FFN, 32 to 256 windows]",
            minimum=1,
        ),
    ] = None
    seq_len: Annotated[int, Option("Tokens per window.", minimum=2)] = 256
    seed: Seed = 0
    eval_text: Annotated[
        tuple[Path, ...],
        Option(
            "Measure quality on this text. Repeat it for several. [held-out windows of the calibration text, "
            "and a text in the package that nothing is calibrated on]"
        ),
    ] = ()
    heldout_sequences: Annotated[
        int, Option("Number of held-out windows for quality.", minimum=1, command_line=False)
    ] = 16
    heldout_len: Annotated[int, Option("Tokens per held-out window.", minimum=2, command_line=False)] = 256
    selection_sequences: Annotated[
        int,
        Option("Number of held-out windows for comparing candidates.", minimum=2, command_line=False),
    ] = 64
    selection_len: Annotated[int, Option("Tokens per such window.", minimum=2, command_line=False)] = 128
