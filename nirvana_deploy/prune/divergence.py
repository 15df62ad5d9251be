"""How far masked models depart from the dense one: KL divergence, many plans on the same windows.

Nothing is built: a plan is judged with its units zeroed. Every model runs layer by layer and leaves only
what comes out of its last layer, [M, T, D]; final norm and head are the dense model's for all of them. So
one walk over the positions computes the dense log-probabilities once, block by block, and compares
all plans with them: exact float32, and no [M, T, V] is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def masked_divergences(
    checkpoint: Path,
    plans: Sequence[PrunePlan],
    tokens: NDArray[np.int64],
    *,
    micro_batch: int = DEFAULT_MICRO_BATCH,
    progress: Progress = SILENT,
) -> NDArray[np.float64]:
    """Mean over positions of KL(dense || masked) in nats, per plan and window: float64 [P, M].

    ``tokens`` are windows [M, T]; all T positions count. Positions are float32, sums over positions float64.
    Raises NirvanaError for a plan that does not fit, or logits that are not finite.
    """
    shape = shape_from_config(config_json(checkpoint))
    weights = SafetensorsWeights(checkpoint)
    dense = StreamedModel(checkpoint, weights, shape)
    batches = micro_batches(torch.from_numpy(tokens), micro_batch)

    def last_states(source: WeightSource) -> torch.Tensor:
        """[M x T, D]."""
        return torch.cat(StreamedModel(checkpoint, source, shape).last_states(batches)).flatten(0, 1)

    at_once = max(1, _STATES_BYTES // (tokens.size * shape.hidden_size * 4))
    divergences = []
    with progress.task("Comparing masked models", len(plans) + 1) as advance:
        reference = last_states(weights)
        head = dense.output_head()
        advance(1)
        for start in range(0, len(plans), at_once):
            compared = []
            for plan in plans[start : start + at_once]:
                compared.append(last_states(MaskedWeights(weights, shape, plan)))
                advance(1)
            divergences += _by_position(head, reference, compared)
    by_position = torch.stack(divergences).reshape(len(plans), *tokens.shape)
    if not torch.isfinite(by_position).all():
        raise NirvanaError(
            "The logits of the dense or a masked model are NaN or infinite; none can be chosen."
        )
    means: NDArray[np.float64] = by_position.mean(dim=2).numpy()
    return means


def _by_position(head: Head, reference: torch.Tensor, compared: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """KL at every position, float64 [M x T], for each of ``compared`` states [M x T, D]."""
    results = [torch.empty(len(reference), dtype=torch.float64) for _ in compared]
    with torch.no_grad():
        for start in range(0, len(reference), _BLOCK_POSITIONS):
            block = slice(start, start + _BLOCK_POSITIONS)
            log_p = head(reference[block]).log_softmax(dim=-1)
            p = log_p.exp()
            for result, states in zip(results, compared, strict=True):
                log_q = head(states[block]).log_softmax(dim=-1)
                result[block] = (p * (log_p - log_q)).sum(dim=-1).double()
    return results
