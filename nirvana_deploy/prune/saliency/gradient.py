"""Saliencies by name, and the output functionals of those that take a gradient: pure maths on tensors.

A gradient saliency scores a weight by ``|w * df/dw|``, the first-order change of f when the weight goes to
zero. Each f is written twice: as defined, on logits, and as its gradient by the states that the head turns
into logits, with the head in blocks of the vocabulary. Scoring uses the second: neither head nor logits are
ever in memory as a whole. What a first-order score cannot see: benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from nirvana_deploy.base.registry import look_up
from nirvana_deploy.prune.saliency.feature import FeatureScore, flap, wanda_sp

Functional = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [n, T, V] float32, tokens [n, T]) -> the sum of f over the n sequences, a scalar."""
Head = Callable[[], Iterator[torch.Tensor]]
"""Walks the rows of the head [V, D] in order, as blocks [C, D] float32; can be called again."""
OutputGradient = Callable[[torch.Tensor, torch.Tensor, Head], torch.Tensor]
"""(states [n, T, D] that the head multiplies, tokens [n, T], head) -> the functional's gradient [n, T, D]."""


def strongest_logits(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum over sequences of the mean over V of the largest logit over T; needs no labels."""
    return logits.max(dim=1).values.mean(dim=1).sum()


def strongest_tokens(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum over sequences of the mean over T of the largest logit over V; needs no labels."""
    return logits.max(dim=2).values.mean(dim=1).sum()


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum over sequences of the mean cross-entropy of the T-1 next tokens."""
    predicted, wanted = logits[:, :-1], tokens[:, 1:]
    loss = cross_entropy(predicted.flatten(0, 1), wanted.flatten(), reduction="sum")
    return loss / wanted.shape[1]


@torch.no_grad()
def strongest_logits_gradient(states: torch.Tensor, tokens: torch.Tensor, head: Head) -> torch.Tensor:
    """Of :func:`strongest_logits`: every entry's row goes to the position where its logit is largest."""
    gradient, vocabulary = torch.zeros_like(states), 0
    for rows in head():
        vocabulary += len(rows)
        strongest = (states @ rows.T).max(dim=1).indices  # [n, C]
        for sequence, positions in zip(gradient, strongest, strict=True):
            sequence.index_add_(0, positions, rows)
    return gradient / vocabulary


@torch.no_grad()
def strongest_tokens_gradient(states: torch.Tensor, tokens: torch.Tensor, head: Head) -> torch.Tensor:
    """Of :func:`strongest_tokens`: every position gets the row of its largest logit."""
    gradient = torch.zeros_like(states)
    largest = states.new_full(states.shape[:2], -torch.inf)
    for rows in head():
        block = (states @ rows.T).max(dim=2)
        larger = block.values > largest
        largest[larger] = block.values[larger]
        gradient[larger] = rows[block.indices[larger]]
    return gradient / states.shape[1]


@torch.no_grad()
def next_token_loss_gradient(states: torch.Tensor, tokens: torch.Tensor, head: Head) -> torch.Tensor:
    """Of :func:`next_token_loss`: softmax minus what was wanted, times the rows; reads the head twice."""
    predicting, wanted = states[:, :-1], tokens[:, 1:]
    total = predicting.new_full(predicting.shape[:2], -torch.inf)  # log of the sum of exp(logits)
    for rows in head():
        total = torch.logaddexp(total, (predicting @ rows.T).logsumexp(dim=2))
    gradient, start = torch.zeros_like(states), 0
    for rows in head():
        excess = (predicting @ rows.T).sub_(total[..., None]).exp_()  # [n, T-1, C]
        here = (wanted >= start) & (wanted < start + len(rows))
        excess[(*here.nonzero(as_tuple=True), wanted[here] - start)] -= 1
        gradient[:, :-1] += excess @ rows
        start += len(rows)
    return gradient / wanted.shape[1]


def sampled_likelihood_gradient(draws: Iterator[torch.Tensor]) -> OutputGradient:
    """Of the sum over positions of log p(y), every y drawn from the model's own p; reads the head twice.

    ``draws`` are uniform numbers from [0, 1), [n, T] for each call. The mean of such a gradient's outer
    product with itself is the Fisher information: no labels are needed.
    """

    @torch.no_grad()
    def gradient_of(states: torch.Tensor, tokens: torch.Tensor, head: Head) -> torch.Tensor:
        total = states.new_full(states.shape[:2], -torch.inf)  # log of the sum of exp(logits)
        for rows in head():
            total = torch.logaddexp(total, (states @ rows.T).logsumexp(dim=2))
        # a little below 1: the probabilities of the blocks add up to 1 but for rounding
        drawn = next(draws).to(states.device) * (1 - 1e-4)
        gradient, below = torch.zeros_like(states), torch.zeros_like(total)
        for rows in head():
            p = (states @ rows.T).sub_(total[..., None]).exp_()  # [n, T, C]
            gradient -= p @ rows
            mass = p.sum(dim=2)
            here = (drawn >= below) & (drawn < below + mass)
            sums = p[here].cumsum(dim=1)
            index = (sums < (drawn - below)[here][:, None]).sum(dim=1).clamp(max=len(rows) - 1)
            gradient[here] += rows[index]
            below += mass
        return gradient

    return gradient_of


@dataclass(frozen=True)
class Saliency:
    """How a weight is scored."""

    functional: Functional | None
    """f, for saliencies that need its gradient and calibration data."""
    output_gradient: OutputGradient | None = None
    """The gradient of ``functional`` at the output, if any."""
    features: FeatureScore | None = None
    """For saliencies that need calibration data but no gradient: the inputs of o and down."""
    reads_weights: bool = True
    """Whether the score depends on the model at all."""
    says: str = ""
    """One line for ``--help``."""

    @property
    def needs_data(self) -> bool:
        """Whether scoring reads calibration text."""
        return self.functional is not None or self.features is not None


SALIENCIES: dict[str, Saliency] = {
    "nirvana": Saliency(
        strongest_logits,
        strongest_logits_gradient,
        says="|w * df/dw|, f = mean of the strongest logits (label-free)",
    ),
    "nirvana-vocab": Saliency(
        strongest_tokens,
        strongest_tokens_gradient,
        says="|w * df/dw|, f = mean over positions of the strongest logit (label-free)",
    ),
    "taylor": Saliency(next_token_loss, next_token_loss_gradient, says="|w * dL/dw|, L = next-token loss"),
    "wanda-sp": Saliency(
        None,
        features=wanda_sp,
        says="|w| times the norm of its input, of o and down; for --allocation uniform",
    ),
    "flap": Saliency(
        None,
        features=flap,
        says="variance of the inputs of o and down times their weights; for --allocation uniform",
    ),
    "magnitude": Saliency(None, says="|w|"),
    "random": Saliency(
        None, reads_weights=False, says="uniform noise by seed; the floor of every comparison"
    ),
}


def saliency_named(name: str) -> Saliency:
    """The saliency called ``name``; raises NirvanaError with the nearest names."""
    return look_up(name, SALIENCIES, what="saliency")
