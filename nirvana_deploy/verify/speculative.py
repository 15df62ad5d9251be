"""Proof that a draft changes nothing: greedy answers are the target's own, token for token.

A pass over several tokens may round otherwise than one over a single token; where that decides between two
tokens that the target itself takes for equally likely, answers part at a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.output.layout import GENAI_FILE
from nirvana_deploy.runtime.genai import (
    GenaiAnswers,
    draft_tokens_of,
    require_speculative,
    target_alone,
)
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.verify.cases import MORE_PROMPTS, prompts_for
from nirvana_deploy.verify.compare import parted_at_a_tie
from nirvana_deploy.verify.report import GreedyCheck, VerifyReport
from nirvana_deploy.verify.tolerance import RELATIVE_TOLERANCE

NEW_TOKENS = 32
Ids = Sequence[int]


def verify_speculative(
    folder: Path, *, threads: int | None = None, progress: Progress = SILENT
) -> VerifyReport:
    """Let the target of ``folder`` answer twenty prompts alone and with its draft, and compare.

    Raises NirvanaError where onnxruntime-genai is missing, too old, or refuses the folder.
    """
    require_speculative()
    prompts = [[int(one) for one in prompt[0]] for prompt in speculative_prompts(folder)]
    with target_alone(folder) as target, progress.task("Verifying the draft", 2 * len(prompts)) as advance:
        found: list[list[Ids]] = []
        for place in (target, folder):
            model = GenaiAnswers(place, threads=threads)
            found.append([])
            for prompt in prompts:
                found[-1].append(model.answer(prompt, new_tokens=NEW_TOKENS).ids)
                advance(1)
    check = compare_answers(folder, prompts, found[0], {draft_tokens_of(folder): found[1]}, NEW_TOKENS)
    return VerifyReport(checks=(), greedy=check, first_departure=None)


def speculative_prompts(folder: Path) -> list[NDArray[np.int64]]:
    """Token ids [1, T] of twenty prompts, by the tokenizer of a folder."""
    return prompts_for(folder, int(read_json(folder / GENAI_FILE)["model"]["vocab_size"]), MORE_PROMPTS)


def compare_answers(
    folder: Path,
    prompts: Sequence[Ids],
    alone: Sequence[Ids],
    drafted: Mapping[int, Sequence[Ids]],
    new_tokens: int,
) -> tuple[GreedyCheck, ...]:
    """One check for each number of draft tokens; where answers part, the target's graph says if at a tie."""
    return tuple(_check(folder, prompts, alone, found, count, new_tokens) for count, found in drafted.items())


def _check(
    folder: Path,
    prompts: Sequence[Ids],
    alone: Sequence[Ids],
    found: Sequence[Ids],
    draft_tokens: int,
    new_tokens: int,
) -> GreedyCheck:
    answers = zip(prompts, alone, found, strict=True)
    parted = [(prompt, own, other) for prompt, own, other in answers if list(own) != list(other)]
    ties = 0
    if parted:
        with OrtDecoder(folder) as target:
            ties = sum(
                parted_at_a_tie(target, np.array([prompt], dtype=np.int64), own, other, RELATIVE_TOLERANCE)
                for prompt, own, other in parted
            )
    return GreedyCheck(
        runtime=f"onnxruntime-genai with {draft_tokens} draft token{'' if draft_tokens == 1 else 's'}",
        prompts=len(prompts),
        new_tokens=new_tokens,
        equal_prompts=len(prompts) - len(parted),
        ties=ties,
        passed=len(parted) == ties,
    )
