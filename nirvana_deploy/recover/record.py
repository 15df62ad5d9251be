"""What recovery did: its data, its course, and what it kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CurvePoint:
    """The model after some steps."""

    step: int
    tokens: int
    seconds: float
    """Of training, measuring included."""
    kl: float
    """Mean over the positions of the watching windows of KL(dense || pruned), nats."""
    other_kl: float | None = None
    """The same, on windows of a kind that is not trained on, if any watch."""

    @property
    def chosen_by(self) -> float:
        """The mean of both kinds, whose least is kept."""
        return self.kl if self.other_kl is None else (self.kl + self.other_kl) / 2


@dataclass(frozen=True)
class Recovered:
    """A finished recovery."""

    options: dict[str, Any]
    """Of the recipe: budget, method, text and the rest."""
    seed: int
    text: str
    """Readable name of what was trained on."""
    text_sha256: str
    train_windows: int
    """Distinct ones."""
    watch_windows: int
    window_tokens: int
    step_windows: int
    steps: int
    """That the budget gave; the learning rate falls to its end at the last."""
    steps_done: int
    kept_step: int
    """Whose state was kept: the one of least KL, both kinds alike. 0: no training; nothing was better."""
    tokens: int
    """Read until ``steps_done``."""
    seconds: float
    writing_seconds: float
    """Of drawing and writing text, part of a budget in time."""
    learning_rate: float
    trained_parameters: int
    stored_teacher: bool
    """Whether the dense model's states were on disk."""
    processes: int
    """That shared the windows of each step."""
    curve: tuple[CurvePoint, ...]
    """At step 0 first."""
    cut_kl: float
    """Of the cut before training, on the held-out windows of quality, which had no say in training."""
    cut_perplexity: float
    answers_of_cut: tuple[str, ...] = field(default=())
    """What the cut wrote before training, prompt by prompt as ``answers.json`` has them."""
    bfloat16: bool = False
    """Whether products were computed in it."""
    stopped: str = ""
    """Why training ended before its time, if its loss was no number any more."""
    other_text: str | None = None
    """The kind of text that is not trained on and watched too, if any."""

    @property
    def tokens_per_second(self) -> float:
        """Of training alone."""
        return self.tokens / self.seconds if self.seconds else 0.0
