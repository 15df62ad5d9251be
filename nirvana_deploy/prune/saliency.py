"""Output functionals and weight scores: which number a unit's importance is derived from.

A gradient saliency scores a weight by ``|w * df/dw|``, the first-order change of f when the weight goes to
zero. ``nirvana`` takes a label-free f [the authors' code: logits, maximum over positions, mean over the
vocabulary]; ``nirvana-vocab`` takes its other reading, the maximum over the vocabulary, mean over positions,
which follows the token that the model would say at each position; ``taylor`` takes the language-model loss.
``wanda-sp`` and ``flap`` need no gradient (``features.py``). Pure maths on tensors: no model, no device,
no log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from nirvana_deploy.prune.features import FeatureScore, flap, wanda_sp
from nirvana_deploy.registry import look_up

Functional = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [n, T, V] float32, tokens [n, T]) -> the sum of f over the n sequences, a scalar."""


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


@dataclass(frozen=True)
class Saliency:
    """How a weight is scored."""

    functional: Functional | None
    """f, for saliencies that need its gradient and calibration data."""
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
    "nirvana": Saliency(strongest_logits, says="|w * df/dw|, f = mean of the strongest logits (label-free)"),
    "nirvana-vocab": Saliency(
        strongest_tokens, says="|w * df/dw|, f = mean over positions of the strongest logit (label-free)"
    ),
    "taylor": Saliency(next_token_loss, says="|w * dL/dw|, L = next-token loss"),
    "wanda-sp": Saliency(None, features=wanda_sp, says="|w| times the norm of its input, of o and down"),
    "flap": Saliency(None, features=flap, says="variance of the inputs of o and down times their weights"),
    "magnitude": Saliency(None, says="|w|"),
    "random": Saliency(
        None, reads_weights=False, says="uniform noise by seed; the floor of every comparison"
    ),
}


def saliency_named(name: str) -> Saliency:
    """The saliency called ``name``; raises NirvanaError with the nearest names."""
    return look_up(name, SALIENCIES, what="saliency")
