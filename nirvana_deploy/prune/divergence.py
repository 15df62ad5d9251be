"""How far masked models depart from the dense one: KL divergence, many plans on the same windows.

Nothing is built: a plan is judged with its units zeroed. Every model runs layer by layer and leaves only
what comes out of its last layer, [M, T, D]; final norm and head are the dense model's for all of them. So
one walk over the positions computes the dense log-probabilities once, block by block, and compares
all plans with them: exact float32, and no [M, T, V] is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.model.checkpoint import config_json
from nirvana_deploy.model.shape import shape_from_config
from nirvana_deploy.model.weights import SafetensorsWeights, WeightSource
from nirvana_deploy.progress import SILENT, Progress
from nirvana_deploy.prune.plan import PrunePlan
from nirvana_deploy.prune.score import DEFAULT_MICRO_BATCH, StreamedModel, micro_batches
from nirvana_deploy.prune.slicing import MaskedWeights

Head = Callable[[torch.Tensor], torch.Tensor]
"""States [..., D] to logits [..., V]."""
_BLOCK_POSITIONS = 128
_STATES_BYTES = 2 << 30
"""What the last states of the plans compared in one walk may take; more plans are walked in turns."""


@dataclass(frozen=True)
class MaskedQuality:
    """What P masked models and the dense one make of M windows; all float64, nats."""

    divergence: NDArray[np.float64]
    """[P, M]: mean over the T positions of KL(dense || masked)."""
    loss: NDArray[np.float64]
    """[P, M]: mean over the T - 1 positions with a next token of its negative log-likelihood."""
    dense_loss: NDArray[np.float64]
    """[M]: the same of the dense model."""


def masked_divergences(
    checkpoint: Path,
    plans: Sequence[PrunePlan],
    tokens: NDArray[np.int64],
    *,
    micro_batch: int = DEFAULT_MICRO_BATCH,
    progress: Progress = SILENT,
) -> NDArray[np.float64]:
    """``masked_quality(...).divergence``, float64 [P, M]."""
    return masked_quality(checkpoint, plans, tokens, micro_batch=micro_batch, progress=progress).divergence


def masked_quality(
    checkpoint: Path,
    plans: Sequence[PrunePlan],
    tokens: NDArray[np.int64],
    *,
    micro_batch: int = DEFAULT_MICRO_BATCH,
    progress: Progress = SILENT,
) -> MaskedQuality:
    """KL to the dense model and next-token loss of P masked models on windows [M, T].

    Each position is computed in float32, sums over positions in float64. Raises NirvanaError for a plan that
    does not fit, or logits that are not finite.
    """
    shape = shape_from_config(config_json(checkpoint))
    weights = SafetensorsWeights(checkpoint)
    batches = micro_batches(torch.from_numpy(tokens), micro_batch)
    next_tokens = torch.from_numpy(np.roll(tokens, -1, axis=1)).flatten()  # the last of a window is not used

    def last_states(source: WeightSource) -> torch.Tensor:
        """[M x T, D]."""
        return torch.cat(StreamedModel(checkpoint, source, shape).last_states(batches)).flatten(0, 1)

    at_once = max(1, _STATES_BYTES // (tokens.size * shape.hidden_size * 4))
    results: list[_Positions] = []
    with progress.task("Comparing masked models", len(plans) + 1) as advance:
        reference = last_states(weights)
        head = StreamedModel(checkpoint, weights, shape).output_head()
        advance(1)
        for start in range(0, max(len(plans), 1), at_once):
            compared = [reference]
            for plan in plans[start : start + at_once]:
                compared.append(last_states(MaskedWeights(weights, shape, plan)))
                advance(1)
            by_model = _by_position(head, compared, next_tokens)
            results += by_model if start == 0 else by_model[1:]
    divergence = torch.stack([r.divergence for r in results]).reshape(-1, *tokens.shape)
    loss = torch.stack([r.loss for r in results]).reshape(-1, *tokens.shape)[:, :, :-1]
    if not (torch.isfinite(divergence).all() and torch.isfinite(loss).all()):
        raise NirvanaError(
            "The logits of the dense or a masked model are NaN or infinite; none can be chosen."
        )
    losses: NDArray[np.float64] = loss.mean(dim=2).numpy()
    return MaskedQuality(divergence=divergence[1:].mean(dim=2).numpy(), loss=losses[1:], dense_loss=losses[0])


@dataclass(frozen=True)
class _Positions:
    """Of one model, float64 [M x T] each."""

    divergence: torch.Tensor
    loss: torch.Tensor


def _by_position(head: Head, compared: Sequence[torch.Tensor], next_tokens: torch.Tensor) -> list[_Positions]:
    """Compare states [M x T, D] with the first of them, which are the dense model's."""
    count = len(next_tokens)
    results = [
        _Positions(torch.empty(count, dtype=torch.float64), torch.empty(count, dtype=torch.float64))
        for _ in compared
    ]
    with torch.no_grad():
        for start in range(0, count, _BLOCK_POSITIONS):
            block = slice(start, start + _BLOCK_POSITIONS)
            log_p = head(compared[0][block]).log_softmax(dim=-1)
            p = log_p.exp()
            for index, (result, states) in enumerate(zip(results, compared, strict=True)):
                log_q = log_p if index == 0 else head(states[block]).log_softmax(dim=-1)
                result.divergence[block] = (p * (log_p - log_q)).sum(dim=-1).double()
                result.loss[block] = -log_q.gather(1, next_tokens[block, None])[:, 0].double()
    return results
