"""A cut beside the dense model, both streamed: neither is whole in memory; norms and heads are its own."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.progress import Progress
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.streaming.model import States, StreamedModel, micro_batches
from nirvana_deploy.recover.learning.losses import BlockLoss, divergence, next_token, total

_BATCH_TOKENS = 1024


def streamed_quality(
    cut: Checkpoint, dense: Checkpoint, windows: NDArray[np.int64], *, progress: Progress
) -> tuple[float, float]:
    """(mean KL(dense || cut) of a position, mean loss of a next token) on windows [N, T], nats."""
    models = StreamedModel(dense), StreamedModel(cut)
    batches = micro_batches(torch.from_numpy(windows), max(1, _BATCH_TOKENS // windows.shape[1]))
    label = "Comparing the cut with the dense model"
    with progress.task(label, len(cut.shape.layers) + len(dense.shape.layers)) as advance:
        wanted, states = (
            model.last_states_of([lambda weights: weights], batches, advance=advance)[0] for model in models
        )
    kl = mean_kl(models[1], models[0], states, wanted)
    head, losses, count = models[1].output_head(), 0.0, 0
    for batch, one in zip(batches, states, strict=True):
        following = models[1].next_tokens(batch)
        following[:, -1] = -100
        losses += total(one.flatten(0, 1), next_token(head, following.flatten().to(one.device)))
        count += int((following >= 0).sum())
    return kl, losses / count


def mean_kl(cut: StreamedModel, dense: StreamedModel, states: States, wanted: States) -> float:
    """Mean KL(dense || cut) of a position, nats, behind the last states [n, T, D] of each."""
    student, teacher = cut.output_head(), dense.output_head()
    kl, count = 0.0, 0
    for one, other in zip(states, wanted, strict=True):
        loss: BlockLoss = divergence(student, teacher, other.flatten(0, 1))
        kl += total(one.flatten(0, 1), loss)
        count += one[..., 0].numel()
    return kl / count
