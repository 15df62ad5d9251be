"""KL divergence of pruned models from the dense one: many plans on the same windows.

No checkpoint is built. Each block is read once and cut in memory for every plan (those of an encoder-decoder
are masked); of each model only the states that leave its last block stay, [M, T, D]. Norm and head are the
dense model's for all, so the dense log-probabilities are computed once, block of positions by block, and
compared with every plan's: exact float32, and no [M, T, V] is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Advance, Progress
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import SafetensorsWeights, WeightSource
from nirvana_deploy.prune.plan import PrunePlan
from nirvana_deploy.prune.slicing import MaskedWeights, ReplacedWeights, SlicedWeights
from nirvana_deploy.prune.streaming.model import StreamedModel, View, micro_batches

Head = Callable[[torch.Tensor], torch.Tensor]
"""States [..., D] to logits [..., V]."""
_BATCH_TOKENS = 1024
_BLOCK_POSITIONS = 128


@dataclass(frozen=True)
class MaskedQuality:
    """P pruned models and the dense one on M windows; all float64, nats."""

    divergence: NDArray[np.float64]
    """[P, M]: mean over the T positions of KL(dense || pruned); an encoder-decoder's are the decoder's."""
    loss: NDArray[np.float64]
    """[P, M]: mean over the T - 1 positions with a next token of its negative log-likelihood."""
    dense_loss: NDArray[np.float64]
    """[M]: the same of the dense model."""


def masked_divergences(
    checkpoint: Checkpoint,
    plans: Sequence[PrunePlan],
    tokens: NDArray[np.int64],
    *,
    progress: Progress = SILENT,
) -> NDArray[np.float64]:
    """``masked_quality(...).divergence`` on one set of windows [M, T]; float64 [P, M]."""
    [quality] = masked_quality(checkpoint, plans, [tokens], progress=progress)
    return quality.divergence


def masked_quality(
    checkpoint: Checkpoint,
    plans: Sequence[PrunePlan],
    window_sets: Sequence[NDArray[np.int64]],
    *,
    reconstructions: Sequence[Path | None] | None = None,
    states_bytes: int = 2 << 30,
    device: torch.device | None = None,
    progress: Progress = SILENT,
) -> list[MaskedQuality]:
    """KL to the dense model and next-token loss of P pruned models, for each set of windows [M, T].

    All sets are read in one pass; they may differ in M and T. Each position is computed in float32, sums over
    positions in float64. ``reconstructions`` are the folders that ``reconstruct_layers`` wrote for the plans
    (None: the plain cut). Plans whose states take more than ``states_bytes`` are
    compared in turns. Raises NirvanaError for a plan that does not fit, or logits that are not finite.
    """
    shape, model = checkpoint.shape, StreamedModel(checkpoint, device=device)
    folders = reconstructions or [None] * len(plans)
    sets = [torch.from_numpy(windows) for windows in window_sets]
    batches = [
        batch
        for windows in sets
        for batch in micro_batches(windows, max(1, _BATCH_TOKENS // windows.shape[1]))
    ]
    targets = [model.next_tokens(windows) for windows in sets]
    next_tokens = torch.cat([windows.flatten() for windows in targets])
    positions = sum(read.numel() for windows in sets for read in model.read(windows))
    at_once = max(1, states_bytes // (positions * shape.hidden_size * 4) - 1)
    steps = (len(plans) + 1) * (len(shape.layers) + 1)
    results: list[_Positions] = []
    with progress.task("Comparing pruned models", steps) as advance:

        def last_states(views: Sequence[View]) -> list[torch.Tensor]:
            """[positions, D] each."""
            states = model.last_states_of(views, batches, advance=advance)
            return [torch.cat([batch.flatten(0, 1) for batch in one]) for one in states]

        [reference] = last_states([_dense])
        head = model.output_head()
        for start in range(0, max(len(plans), 1), at_once):
            views = [
                _pruned(shape, plan, folder)
                for plan, folder in zip(plans[start : start + at_once], folders[start:], strict=False)
            ]
            by_model = _by_position(head, [reference, *last_states(views)], next_tokens, advance)
            results += by_model if start == 0 else by_model[1:]
    return _by_window(results, [windows.shape for windows in targets])


def _dense(weights: WeightSource) -> WeightSource:
    return weights


def _pruned(shape: ModelShape, plan: PrunePlan, reconstruction: Path | None) -> View:
    refitted = None if reconstruction is None else SafetensorsWeights(reconstruction)
    if shape.family.encoder_decoder or shape.family.decoder.fused:  # layers are built from one shape
        return lambda weights: MaskedWeights(weights, shape, plan, refitted)
    if refitted is None:
        return lambda weights: SlicedWeights(weights, shape, plan)
    return lambda weights: ReplacedWeights(SlicedWeights(weights, shape, plan), refitted)


@dataclass(frozen=True)
class _Positions:
    """Of one model, float64 [positions] each."""

    divergence: torch.Tensor
    loss: torch.Tensor


def _by_position(
    head: Head, compared: Sequence[torch.Tensor], next_tokens: torch.Tensor, advance: Advance
) -> list[_Positions]:
    """Compare states [positions, D] with the first of them, which are the dense model's."""
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
                following = next_tokens[block, None].to(log_q.device)
                result.divergence[block] = (p * (log_p - log_q)).sum(dim=-1).cpu().double()
                result.loss[block] = -log_q.gather(1, following)[:, 0].cpu().double()
    advance(len(compared))
    return results


def _by_window(results: Sequence[_Positions], shapes: Sequence[torch.Size]) -> list[MaskedQuality]:
    """Means over the positions of windows [M, T], of the dense model and then of the P plans."""
    divergence = torch.stack([result.divergence for result in results])
    loss = torch.stack([result.loss for result in results])
    if not (torch.isfinite(divergence).all() and torch.isfinite(loss).all()):
        raise NirvanaError(
            "The logits of the dense or a pruned model are NaN or infinite; none can be chosen."
        )
    sizes = [shape.numel() for shape in shapes]
    qualities = []
    by_set = zip(shapes, torch.split(divergence, sizes, 1), torch.split(loss, sizes, 1), strict=True)
    for shape, kl, nll in by_set:
        losses: NDArray[np.float64] = nll.reshape(-1, *shape)[:, :, :-1].mean(dim=2).numpy()
        divergences = kl.reshape(-1, *shape)[1:].mean(dim=2).numpy()
        qualities.append(MaskedQuality(divergence=divergences, loss=losses[1:], dense_loss=losses[0]))
    return qualities
