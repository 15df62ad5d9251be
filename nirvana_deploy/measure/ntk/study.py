"""How much a cut changes the tangent kernels of a model: predicted and measured.

All numbers are exact: an inner product over all weights is a sum over blocks, so one streamed backward pass
per window suffices, with the gradients of one block for n windows in memory. The maths is in ``kernels.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.measure.ntk.kernels import (
    Kernels,
    Matrix,
    Removed,
    Vector,
    kernels_of,
    no_kernels,
    removed_part,
)
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.weights import WeightSource
from nirvana_deploy.prune.plan import PrunePlan
from nirvana_deploy.prune.saliency.gradient import Saliency, saliency_named
from nirvana_deploy.prune.saliency.units import Kept, kept_positions
from nirvana_deploy.prune.slicing import MaskedWeights
from nirvana_deploy.prune.streaming.loading import CPU
from nirvana_deploy.prune.streaming.model import StreamedModel, micro_batches
from nirvana_deploy.prune.streaming.score import gradients_of

_DEFAULT_FUNCTIONAL = "nirvana"


@dataclass(frozen=True)
class CutDrift:
    """One cut, predicted and measured."""

    name: str
    saliency: str
    seed: int
    removed_share: float
    """Share of the decoder's linear weights."""
    removed: Removed
    kernels: Kernels
    """Kernels of the pruned model."""
    values: Vector
    """[n]: f' of each window."""


@dataclass(frozen=True)
class NtkStudy:
    """The dense model's kernels, and how each cut changed them."""

    functional: str
    """Name of the gradient saliency whose f this is."""
    window_tokens: int
    values: Vector
    """[n]: f of each window."""
    whole: Removed
    """Removing all prunable weights: the kernels and sums that shares refer to."""
    cuts: tuple[CutDrift, ...]

    def to_json(self) -> dict[str, Any]:
        """The record ntk.json: matrices and the numbers read off them."""
        dense = self.whole.kernels
        return {
            "schema": 1,
            "functional": self.functional,
            "windows": len(self.values),
            "window_tokens": self.window_tokens,
            "dense": {
                "values": self.values.tolist(),
                "saliency": self.whole.saliency.tolist(),
                "adam": dense.adam.tolist(),
                "plain": dense.plain.tolist(),
            },
            "cuts": [self._cut_json(cut) for cut in self.cuts],
        }

    def _cut_json(self, cut: CutDrift) -> dict[str, Any]:
        dense, removed = self.whole.kernels, cut.removed
        trainability = np.diag(removed.kernels.adam)
        bound = np.sqrt(len(trainability)) * np.linalg.norm(trainability) / np.linalg.norm(dense.adam)
        return {
            "name": cut.name,
            "saliency": cut.saliency,
            "seed": cut.seed,
            "removed_share": cut.removed_share,
            "values": cut.values.tolist(),
            "zero_shot": {
                "change": (self.values - cut.values).tolist(),
                "first_order_change": removed.change.tolist(),
                "removed_saliency": removed.saliency.tolist(),
                "removed_saliency_share": (removed.saliency / self.whole.saliency).tolist(),
            },
            "adam": {
                **_drift_json(dense.adam, cut.kernels.adam, removed.kernels.adam),
                "removed_bound": float(bound),
            },
            "plain": _drift_json(dense.plain, cut.kernels.plain, removed.kernels.plain),
        }


def _drift_json(dense: Matrix, pruned: Matrix, removed: Matrix) -> dict[str, Any]:
    """Norms relative to the dense kernel's (Frobenius); the diagonal relative to itself, loss positive."""
    norm = np.linalg.norm(dense)
    return {
        "kernel": pruned.tolist(),
        "removed_kernel": removed.tolist(),
        "drift": float(np.linalg.norm(dense - pruned) / norm),
        "removed": float(np.linalg.norm(removed) / norm),
        "moved": float(np.linalg.norm(dense - removed - pruned) / norm),
        "diagonal_drift": (np.diag(dense - pruned) / np.diag(dense)).tolist(),
        "diagonal_removed": (np.diag(removed) / np.diag(dense)).tolist(),
    }


def measure_ntk(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    tokens: NDArray[np.int64],
    *,
    functional: str | None = None,
    random_seeds: Sequence[int] = (0,),
    progress: Progress = SILENT,
) -> NtkStudy:
    """Measure the kernels of a dense checkpoint and of its cut by ``plan``, on windows [n, T].

    f is that of ``functional``, a gradient saliency [the plan's own, else "nirvana"]. The plan is compared
    with one random cut of the same budget for each of ``random_seeds``. Changes nothing on disk. Raises
    NirvanaError for an encoder-decoder, a plan that does not fit, a saliency without gradient, empty windows,
    and gradients that are not finite.
    """
    if tokens.ndim != 2 or tokens.size == 0:
        raise NirvanaError(f"A kernel needs windows [n, T] with n and T at least 1, got {tokens.shape}.")
    name = functional or (plan.saliency if saliency_named(plan.saliency).functional else _DEFAULT_FUNCTIONAL)
    method = saliency_named(name)
    if method.functional is None:
        raise NirvanaError(f"The saliency {name!r} takes no gradient, so it has no tangent kernel.")
    shape = checkpoint.shape
    if shape.family.encoder_decoder:
        raise NirvanaError(f"This needs a decoder-only model; {shape.family.name} is an encoder-decoder.")
    plans = {"pruned": plan}
    for seed in random_seeds:
        label = "random" if len(random_seeds) == 1 else f"random {seed}"
        plans[label] = _random_plan(checkpoint, plan, seed)
    windows = torch.from_numpy(tokens)
    masks = [kept_positions(shape, one.kept_groups, one.kept_neurons) for one in plans.values()]
    masked = [
        MaskedWeights(checkpoint.weights, shape, one) for one in plans.values()
    ]  # refuses one that does not fit
    values, whole, parts = _dense_pass(
        _Model(checkpoint, checkpoint.weights), windows, method, masks, progress
    )
    cuts = []
    for (label, one), source, part in zip(plans.items(), masked, parts, strict=True):
        pruned_values, kernels = _kernel_pass(_Model(checkpoint, source), windows, method, progress)
        cuts.append(
            CutDrift(
                name=label,
                saliency=one.saliency,
                seed=one.seed,
                removed_share=one.budget.met_removed_share,
                removed=part,
                kernels=kernels,
                values=pruned_values,
            )
        )
    return NtkStudy(
        functional=name, window_tokens=tokens.shape[1], values=values, whole=whole, cuts=tuple(cuts)
    )


def _random_plan(checkpoint: Checkpoint, plan: PrunePlan, seed: int) -> PrunePlan:
    """Draw units at random, as many of each layer as ``plan`` keeps."""
    generator = np.random.default_rng(seed)

    def drawn(of: int, kept: int) -> tuple[int, ...]:
        return tuple(sorted(generator.permutation(of)[:kept].tolist()))

    layers = tuple(
        replace(
            layer,
            kept_groups=drawn(layer.of_groups, len(layer.kept_groups)),
            kept_neurons=drawn(layer.of_neurons, len(layer.kept_neurons)),
        )
        for layer in plan.layers
    )
    return replace(plan, layers=layers, saliency="random")


class _Model:
    """A checkpoint's weights, dense or masked, streamed block by block."""

    def __init__(self, checkpoint: Checkpoint, weights: WeightSource) -> None:
        self.weights = weights
        self._streamed = StreamedModel(checkpoint, weights, device=CPU)

    def values(self, windows: torch.Tensor, method: Saliency) -> Vector:
        """f of each window of [n, T], [n]."""
        batches = micro_batches(windows, 1)
        states, head = self._streamed.last_states(batches), self._streamed.output_head()
        with torch.no_grad():
            assert method.functional is not None
            pairs = zip(states, batches, strict=True)
            return np.array([float(method.functional(head(s), b)) for s, b in pairs])

    def each_tensor(
        self,
        windows: torch.Tensor,
        method: Saliency,
        use: Callable[[str, list[torch.Tensor]], None],
        progress: Progress,
    ) -> None:
        """Call ``use`` once for every prunable tensor: its name and its gradient for each window."""
        shape, gathered = self._streamed.shape, dict[str, list[torch.Tensor]]()

        def visit(layers: Sequence[int], parameters: Mapping[str, nn.Parameter]) -> None:
            for layer in layers:
                for name, gradient in gradients_of(shape, layer, parameters).items():
                    if not torch.isfinite(gradient).all():
                        raise NirvanaError(
                            f"{shape.label(layer)}: the gradients are NaN or infinite; its kernel cannot be "
                            "measured."
                        )
                    gathered.setdefault(name, []).append(gradient)
                    if len(gathered[name]) == len(windows):
                        use(name, gathered.pop(name))

        assert method.output_gradient is not None
        self._streamed.backward(
            windows, method.output_gradient, visit, micro_batch=1, together=False, progress=progress
        )


def _dense_pass(
    model: _Model,
    windows: torch.Tensor,
    method: Saliency,
    masks: Sequence[dict[str, Kept]],
    progress: Progress,
) -> tuple[Vector, Removed, list[Removed]]:
    """Return f of the windows, the sums over all weights, and the part of each cut."""
    nothing = Removed(no_kernels(len(windows)), np.zeros(len(windows)), np.zeros(len(windows)))
    totals = [nothing] * (1 + len(masks))

    def use(name: str, gradients: list[torch.Tensor]) -> None:
        weight = model.weights.load(name).float()
        for index, kept in enumerate([None, *(mask[name] for mask in masks)]):
            totals[index] += removed_part(weight, gradients, kept)

    model.each_tensor(windows, method, use, progress)
    return model.values(windows, method), totals[0], totals[1:]


def _kernel_pass(
    model: _Model, windows: torch.Tensor, method: Saliency, progress: Progress
) -> tuple[Vector, Kernels]:
    """Return f of the windows and the kernels of a masked model."""
    totals = [no_kernels(len(windows))]

    def use(name: str, gradients: list[torch.Tensor]) -> None:
        totals[0] += kernels_of(gradients)

    model.each_tensor(windows, method, use, progress)
    return model.values(windows, method), totals[0]
