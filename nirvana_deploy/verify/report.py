"""What a verification found: the checks, the verdict, and the error that names what failed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import VerificationError

_BLAME_OF_INPUT = (
    "Nothing was pruned between the two, so the input is a suspect too: a config.json that does not fit the "
    "weights, or weights that overflow. See whether transformers alone writes sense with it. "
)


@dataclass(frozen=True)
class LogitsCheck:
    """One comparison of logits, or of an encoder's states."""

    name: str
    max_abs_diff: float
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class GreedyCheck:
    """Greedy continuations of the same prompts by another runtime."""

    runtime: str
    prompts: int
    new_tokens: int
    equal_prompts: int
    ties: int
    """Prompts that parted where the two best logits were closer than the tolerance; they count as equal."""
    passed: bool
    not_run: str | None = None
    """Why this runtime was not asked, when it was not."""


@dataclass(frozen=True)
class TextCheck:
    """Texts as another program's tokenizer reads them; a difference is its own, and reported, no failure."""

    runtime: str
    texts: int
    equal_texts: int
    differs: str | None
    """The first text that it reads otherwise, with both lists of ids."""


@dataclass(frozen=True)
class VerifyReport:
    """Everything that was compared, and the verdict."""

    checks: tuple[LogitsCheck, ...]
    greedy: tuple[GreedyCheck, ...]
    first_departure: str | None
    """Where the two first differ, when they do: "layer 3", "encoder layer 3" or "final norm or head"."""
    text: tuple[TextCheck, ...] = ()

    def __repr__(self) -> str:
        word = "passed" if self.passed else "FAILED"
        return f"VerifyReport({word}, {len(self.checks)} of logits, {len(self.greedy)} of greedy tokens)"

    @property
    def passed(self) -> bool:
        """Whether every comparison that was run passed."""
        return all(check.passed for check in self.checks) and all(check.passed for check in self.greedy)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "passed": self.passed}

    def require_passed(
        self, folder: Path, *, against: str = "its checkpoint", of_input: bool = False
    ) -> None:
        """Raise VerificationError (exit code 3) that names what failed and where it starts.

        ``of_input``: the folder was exported from the user's own model, which may be to blame as well.
        """
        if self.passed:
            return
        failed = [
            f"{check.name}: logits differ by {check.max_abs_diff:.2e} (allowed {check.tolerance:.2e})"
            for check in self.checks
            if not check.passed
        ] + [
            f"{check.runtime}: {check.prompts - check.equal_prompts - check.ties} of {check.prompts} prompts "
            "continue differently"
            for check in self.greedy
            if not check.passed
        ]
        where = f" The first departure is at: {self.first_departure}." if self.first_departure else ""
        raise VerificationError(
            f"{folder} does not compute what {against} computes. {'; '.join(failed)}.{where}",
            hint=(_BLAME_OF_INPUT if of_input else "")
            + "The artifacts are kept. 'nirvana-deploy doctor' lists the versions in use.",
        )
