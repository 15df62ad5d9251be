"""A target with its draft, tried out: that answers stay the same, and how many tokens to propose."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import claim, write_json
from nirvana_deploy.base.machine import cpu_name, environment
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.measure.speculative import NEW_TOKENS, Speculation, hear, speculation_of
from nirvana_deploy.output.layout import SPECULATIVE_FILE
from nirvana_deploy.package.speculative import set_draft_tokens
from nirvana_deploy.verify.report import VerifyReport
from nirvana_deploy.verify.speculative import compare_answers, speculative_prompts


@dataclass(frozen=True)
class SpeculativePackage:
    """A folder with a target and its draft, proved and measured."""

    path: Path
    target: str
    draft: str
    found: Speculation
    report: VerifyReport
    record: dict[str, Any]
    """Content of its speculative.json."""

    def __repr__(self) -> str:
        best = self.found.best
        word = "the target's own answers" if self.report.passed else "OTHER ANSWERS"
        return (
            f"SpeculativePackage({str(self.path)!r}, {self.draft} drafts {best.draft_tokens} tokens for "
            f"{self.target}: {word}, {best.speedup:.2f} times as fast)"
        )


def tried_out(
    folder: Path,
    names: tuple[str, str],
    *,
    draft_tokens: Sequence[int],
    new_tokens: int = NEW_TOKENS,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> SpeculativePackage:
    """Let target and draft, called ``names``, answer twenty prompts; keep the fastest of ``draft_tokens``.

    Of those alone with which answers stay the target's own, if there are any: quantized kernels may give
    other logits for several tokens at a time than for one. Writes speculative.json into ``folder``, and the
    number into its genai_config.json. Raises NirvanaError when onnxruntime-genai refuses the folder; a
    changed answer is a result, no exception.
    """
    prompts = [[int(one) for one in prompt[0]] for prompt in speculative_prompts(folder)]
    heard = hear(
        folder,
        prompts,
        draft_tokens=draft_tokens,
        new_tokens=new_tokens,
        threads=threads,
        progress=progress,
    )
    alone = [answer.ids for answer in heard.alone]
    drafted = {count: [one.ids for one in answers] for count, answers in heard.drafted.items()}
    checks = compare_answers(folder, prompts, alone, drafted, new_tokens)
    same = {count: check for count, check in zip(drafted, checks, strict=True) if check.passed}
    found = speculation_of(heard, new_tokens=new_tokens, threads=threads, among=same)
    report = VerifyReport(checks=(), greedy=tuple(same.values()) or checks, first_departure=None)
    record = {
        "schema": 1,
        "target": names[0],
        "draft": names[1],
        **asdict(found),
        "same_answers": {"passed": report.passed, "greedy": [asdict(check) for check in checks]},
        "environment": {
            "cpu": cpu_name(),
            "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            **environment(),
        },
    }
    set_draft_tokens(folder, found.chosen)
    claim(folder, (SPECULATIVE_FILE,))
    write_json(folder / SPECULATIVE_FILE, record)
    return SpeculativePackage(folder, *names, found, report, record)
