"""Score every KV group and FFN neuron of a model; memory is bounded by one block with its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.refit.dense_states import DenseStates, aims_noted
from nirvana_deploy.prune.refit.readers import readers_of
from nirvana_deploy.prune.saliency.feature import FeatureScore, FeatureStatistics, merged, statistics_of
from nirvana_deploy.prune.saliency.gradient import Saliency, saliency_named
from nirvana_deploy.prune.saliency.units import UnitScores, scored_tensors, unit_sums
from nirvana_deploy.prune.streaming.model import Runs, States, StreamedModel
from nirvana_deploy.prune.streaming.processes import Share, is_first, share_of, tell

DEFAULT_MICRO_BATCH = 8
SCORE = "score"
"""The work that processes share."""
_Sums = dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Position in ``shape.layers`` -> (groups [K], neurons [F])."""


def score_units(
    checkpoint: Checkpoint,
    tokens: NDArray[np.int64] | None,
    *,
    saliency: str = "nirvana",
    seed: int = 0,
    micro_batch: int = DEFAULT_MICRO_BATCH,
    spill: bool | None = None,
    spill_folder: Path | None = None,
    device: torch.device | None = None,
    progress: Progress = SILENT,
) -> UnitScores:
    """Score the KV groups and FFN neurons of a checkpoint.

    ``tokens`` [N, T] are the calibration windows (None for saliencies that need no data), ``seed`` serves
    ``random`` alone, ``micro_batch`` is in sequences. ``spill`` keeps hidden states in a temporary file of
    ``spill_folder`` [the system's]; None spills large ones (``layer_states.py``). It does not change
    the scores, nor does the number of processes that share the windows. ``device`` defaults to a GPU if torch
    sees one. Raises NirvanaError for NaN or infinite weights, activations or gradients, naming the tensor or
    the layer, and for a disk too small for the file.
    """
    method, shape = saliency_named(saliency), checkpoint.shape
    if not method.needs_data:
        if method.reads_weights:
            return _magnitudes(checkpoint, progress)
        generator = np.random.default_rng(seed)
        return UnitScores(
            groups=tuple(generator.random(layer.kv_heads) for layer in shape.layers),
            neurons=tuple(generator.random(layer.ffn_width) for layer in shape.layers),
        )
    if tokens is None:
        raise NirvanaError(f"The saliency {saliency!r} needs calibration text.", hint="Pass --calib SOURCE.")
    windows = torch.from_numpy(tokens)
    tell(
        {"work": SCORE, "checkpoint": str(checkpoint.path), "saliency": saliency, "micro_batch": micro_batch},
        windows,
    )
    model = StreamedModel(checkpoint, device=device)
    return _unit_scores(
        _scored(
            model, method, windows, micro_batch, spill=spill, spill_folder=spill_folder, progress=progress
        )
    )


def score_for_refit(
    checkpoint: Checkpoint,
    tokens: NDArray[np.int64],
    states: DenseStates,
    *,
    saliency: str,
    micro_batch: int = DEFAULT_MICRO_BATCH,
    progress: Progress = SILENT,
) -> UnitScores:
    """As :func:`score_units`, by a saliency of features, for a refit on the same windows [N, T].

    ``states`` takes what that will need of the dense model, if it fits into memory.
    """
    windows, features = torch.from_numpy(tokens), saliency_named(saliency).features
    assert features is not None
    if not states.begin(checkpoint, windows, micro_batch):
        return score_units(checkpoint, tokens, saliency=saliency, micro_batch=micro_batch, progress=progress)
    model = StreamedModel(checkpoint)
    return _unit_scores(_feature_scores(model, windows, features, micro_batch, progress, states))


def take_part(work: dict[str, Any], windows: torch.Tensor) -> None:
    """Score for the first process, on some of the windows [N, T]."""
    if not len(share_of(windows, work["micro_batch"])[0]):
        return
    model = StreamedModel(Checkpoint.open(Path(work["checkpoint"])))
    _scored(model, saliency_named(work["saliency"]), windows, work["micro_batch"], progress=SILENT)


def _scored(
    model: StreamedModel,
    method: Saliency,
    windows: torch.Tensor,
    micro_batch: int,
    *,
    progress: Progress,
    spill: bool | None = None,
    spill_folder: Path | None = None,
) -> _Sums:
    """The sums over all windows, in the first process."""
    if method.features is not None:
        return _feature_scores(model, windows, method.features, micro_batch, progress)
    assert method.output_gradient is not None
    shape, sums = model.shape, _Sums()

    def use(layers: Sequence[int], parameters: Mapping[str, nn.Parameter]) -> None:
        for layer in layers:
            weighted = {}
            for name, gradient in gradients_of(shape, layer, parameters).items():
                weighted[name] = gradient.mul_(parameters[name].detach()).abs_()
            sums[layer] = unit_sums(shape, layer, weighted)
            _require_finite(shape, layer, sums, "gradients")

    model.backward(
        windows,
        method.output_gradient,
        use,
        micro_batch=micro_batch,
        spill=spill,
        spill_folder=spill_folder,
        progress=progress,
    )
    return sums


def gradients_of(
    shape: ModelShape, layer: int, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The gradients of the ``scored_tensors`` of one layer by checkpoint name."""
    gradients = {name: parameters[name].grad for name in scored_tensors(shape, layer)}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def _feature_scores(
    model: StreamedModel,
    windows: torch.Tensor,
    score: FeatureScore,
    micro_batch: int,
    progress: Progress,
    states: DenseStates | None = None,
) -> _Sums:
    """Score units by the inputs of o and down over windows [N, T]: one forward, no gradient."""
    shape, sums = model.shape, _Sums()
    own, share = share_of(windows, micro_batch)
    label = f"Scoring {windows.shape[0]} x {windows.shape[1]} tokens"
    with progress.task(label, len(shape.layers)) as advance:

        def visit(layers: Sequence[int], block: nn.Module, runs: Runs, _: Runs) -> tuple[States, States]:
            sites = {layer: shape.place(layer)[0] for layer in layers}
            readers = [site.o for site in sites.values()]
            readers += [site.ffn_down for site in sites.values() if site.ffn_rows]
            seen: dict[str, FeatureStatistics] = {}
            left: States = []
            with aims_noted([] if states is None else readers_of(shape, layers, block)) as aims:
                for number, run in share.turns(runs):
                    of_run: dict[str, FeatureStatistics] = {}
                    if run is not None:
                        with recorded_inputs(block, readers, of_run):
                            left.append(run().cpu())
                    _add_statistics(seen, readers, of_run, share, number)
            if states is not None:
                states.keep(layers, aims(left))
            advance(len(layers))
            if not is_first():
                return left, left

            def scores(name: str, units: int, attention: bool) -> NDArray[np.float64]:
                found = score(block.get_parameter(f"{name}.weight"), seen[name], units, attention)
                return found.cpu().numpy()

            for layer, site in sites.items():
                units = shape.layers[layer]
                sums[layer] = (
                    scores(site.o, units.kv_heads, True),
                    scores(site.ffn_down, units.ffn_width, False) if site.ffn_rows else np.zeros(0),
                )
                _require_finite(shape, layer, sums, "activations")
            return left, left

        model.transform_blocks(own, visit, micro_batch=micro_batch)
    return sums


def _add_statistics(
    seen: dict[str, FeatureStatistics],
    names: Sequence[str],
    now: Mapping[str, FeatureStatistics],
    share: Share,
    number: int,
) -> None:
    """Add to ``seen``, in the first process, the statistics of every process's micro-batch of this turn."""
    own = [torch.stack([now[name].total, now[name].squares]) for name in names] if now else None
    positions = [torch.tensor(now[name].positions) for name in names] if now else []
    for _, found in share.gathered(number, None if own is None else [*own, *positions]):
        for name, sums, count in zip(names, found[: len(names)], found[len(names) :], strict=True):
            one = FeatureStatistics(int(count), *sums)
            seen[name] = merged(seen[name], one) if name in seen else one


@contextmanager
def recorded_inputs(
    block: nn.Module, modules: Sequence[str], seen: dict[str, FeatureStatistics]
) -> Iterator[None]:
    """While the block runs, add the statistics of the inputs of ``modules`` to ``seen`` by name."""

    def record(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        now = statistics_of(inputs[0])
        seen[name] = merged(seen[name], now) if name in seen else now

    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs))
        for name in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _magnitudes(checkpoint: Checkpoint, progress: Progress) -> UnitScores:
    shape, sums = checkpoint.shape, _Sums()
    with progress.task("Scoring magnitudes", len(shape.layers)) as advance:
        for layer in range(len(shape.layers)):
            names = scored_tensors(shape, layer)
            weights = {name: checkpoint.weights.load(name).float().abs() for name in names}
            sums[layer] = unit_sums(shape, layer, weights)
            advance(1)
    return _unit_scores(sums)


def _require_finite(shape: ModelShape, layer: int, sums: _Sums, what: str) -> None:
    if not all(np.isfinite(part).all() for part in sums[layer]):
        raise NirvanaError(
            f"{shape.label(layer)}: the {what} are NaN or infinite; its units cannot be ranked."
        )


def _unit_scores(sums: _Sums) -> UnitScores:
    groups, neurons = zip(*(sums[layer] for layer in sorted(sums)), strict=True)
    return UnitScores(groups=groups, neurons=neurons)
