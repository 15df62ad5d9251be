"""Decide what to remove: from scores and a budget to a plan. Pure numbers; no model is touched.

The arithmetic is NIRVANA's (arXiv 2509.14230 and its authors' code), with three decisions of ours: units
are cut by exact count with ties broken by position, every layer keeps its *best* unit of each kind, and
a budget that cannot be met is refused with the largest one that can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.base.shown.html import html_table
from nirvana_deploy.model.family import DECODER
from nirvana_deploy.model.shape import LayerShape, ModelShape
from nirvana_deploy.prune.allocation import ALLOCATIONS, Wish, whole
from nirvana_deploy.prune.saliency.units import UnitScores


@dataclass(frozen=True)
class LayerPlan:
    """What stays of one layer."""

    layer: int
    of_groups: int
    kept_groups: tuple[int, ...]
    """Sorted indices of the KV groups that stay."""
    of_neurons: int
    kept_neurons: tuple[int, ...]
    """Sorted indices of the FFN neurons that stay."""
    site: str = DECODER
    """In an encoder-decoder: "encoder", "decoder" or "cross"; each numbers its layers from 0."""


@dataclass(frozen=True)
class Budget:
    """What was asked and what the plan removes."""

    asked_removed_share: float
    """Of the decoder's linear weights."""
    met_removed_share: float
    """Of the decoder's linear weights, after rounding."""
    removed_groups: int
    of_groups: int
    removed_neurons: int
    """Before rounding; the count that meets the budget."""
    removed_neurons_after_rounding: int
    of_neurons: int
    linear_parameters_dense: int
    linear_parameters_kept: int
    parameters_dense: int
    parameters_kept: int


@dataclass(frozen=True)
class PrunePlan:
    """The decision, complete enough to redo the slice alone."""

    model: dict[str, Any]
    """name, family and the dimensions that pruning leaves alone."""
    sparsity: float
    gamma: float | None
    """MLP sparsity / attention sparsity; None where curves decide both under one budget."""
    saliency: str
    """What ordered the units; "refit": they were chosen inside the refit."""
    allocation: str
    """"curves" or "global": layers differ; "uniform": all layers have one shape."""
    round_to: int
    seed: int
    calibration: dict[str, Any] | None
    """Source, windows, seed and sha256 of the calibration text; None when the saliency needs no data."""
    budget: Budget
    layers: tuple[LayerPlan, ...]
    selection: dict[str, Any] | None = None
    """Held-out KL of every candidate that was tried, where there was a choice."""
    reconstruct: dict[str, Any] | None = None
    """How what is kept is refitted (``refit/``); None for a plain cut."""
    curves: dict[str, Any] | None = None
    """What the curves (``curves/``) predicted, and what the budget counts; None where they had no say."""

    @property
    def kept_groups(self) -> list[tuple[int, ...]]:
        """Per layer, the kept KV groups."""
        return [layer.kept_groups for layer in self.layers]

    @property
    def kept_neurons(self) -> list[tuple[int, ...]]:
        """Per layer, the kept FFN neurons."""
        return [layer.kept_neurons for layer in self.layers]

    def __repr__(self) -> str:
        """What stays, in one line."""
        groups, neurons = (
            (sum(map(len, kept)), sum(getattr(layer, of) for layer in self.layers))
            for kept, of in ((self.kept_groups, "of_groups"), (self.kept_neurons, "of_neurons"))
        )
        return (
            f"PrunePlan(sparsity={self.sparsity:g}, {groups[0]:,} of {groups[1]:,} groups, "
            f"{neurons[0]:,} of {neurons[1]:,} neurons)"
        )

    def _repr_html_(self) -> str:
        """What stays of each layer, for a notebook."""
        rows = [
            (
                f"{one.layer} {one.site}" if one.site != DECODER else one.layer,
                f"{len(one.kept_groups):,} of {one.of_groups:,}",
                f"{len(one.kept_neurons):,} of {one.of_neurons:,}",
            )
            for one in self.layers
        ]
        return html_table(["Layer", "KV groups", "FFN neurons"], rows, title=repr(self))


def default_gamma(shape: ModelShape) -> float:
    """M/A, the ratio of the MLP's to the attention's share of the linear weights."""
    attention, mlp = _costs(shape)
    return mlp / attention


def removed_counts(shape: ModelShape, *, sparsity: float, gamma: float, round_to: int = 1) -> tuple[int, int]:
    """(KV groups, FFN neurons) to remove in the whole model, before rounding.

    s_attn = s (A+M) / (A + gamma M) and s_mlp = gamma s_attn, with A and M the attention's and the MLP's
    linear weights; both counts are rounded down. Raises NirvanaError for a sparsity or gamma outside
    what this model allows, naming the largest feasible sparsity: every layer keeps at least one KV group
    and ``round_to`` neurons. Where no KV group can go, all comes from the FFNs, whatever gamma.
    """
    if round_to < 1:
        raise NirvanaError(f"round_to must be at least 1, got {round_to}.")
    if not (math.isfinite(gamma) and gamma > 0):
        raise NirvanaError(f"gamma must be a positive number, got {gamma}.")
    largest = largest_sparsity(shape, gamma=gamma, round_to=round_to)
    if not 0 < sparsity <= largest:
        divided = _removable(shape, round_to)[0] > 0
        stays = "at least one KV group" if divided else "its KV groups"
        raise NirvanaError(
            f"sparsity must be above 0 and at most {largest:.3f} (the largest feasible"
            f"{f' for gamma {gamma:g}' if divided else ''}), "
            f"got {sparsity}: every layer keeps {stays} and {round_to} FFN neurons.",
            hint=f"Pass --sparsity {math.floor(largest * 100) / 100:g} or less"
            f"{', or another --gamma' if divided else ''}.",
        )
    groups, neurons = _wished_counts(shape, sparsity, gamma)
    return whole(groups), whole(neurons)


def largest_sparsity(shape: ModelShape, *, gamma: float, round_to: int = 1) -> float:
    """The largest share of linear weights that ``gamma`` lets this model lose, as removed share."""
    attention, mlp = _costs(shape)
    groups, neurons = _removable(shape, round_to)
    most_attention = groups / sum(layer.kv_heads for layer in shape.layers)
    most_mlp = neurons / sum(layer.ffn_width for layer in shape.layers)
    if not groups:  # all comes from FFNs, whatever gamma
        return most_mlp * mlp / (attention + mlp)
    attention_sparsity = min(most_attention, most_mlp / gamma)
    return attention_sparsity * (attention + gamma * mlp) / (attention + mlp)


def make_plan(
    shape: ModelShape,
    scores: UnitScores,
    *,
    sparsity: float,
    gamma: float | None = None,
    allocation: str = "global",
    round_to: int = 8,
    saliency: str,
    seed: int = 0,
    model_name: str = "",
    calibration: dict[str, Any] | None = None,
) -> PrunePlan:
    """Cut the least salient units of each kind, as many as the budget asks.

    ``allocation`` is "global" (rank over all layers) or "uniform" (the same counts in every layer, ranked
    inside the layer); ``gamma`` None means M/A. Kept FFN widths are multiples of ``round_to``; what the
    rounding made of the budget is in ``budget``. The same scores give the same plan, byte for byte.
    Raises NirvanaError for a budget that cannot be met, an unknown allocation, or ``uniform`` for a model
    whose layers differ.
    """
    allocate = look_up(allocation, ALLOCATIONS, what="allocation")
    gamma = default_gamma(shape) if gamma is None else gamma
    removed_counts(shape, sparsity=sparsity, gamma=gamma, round_to=round_to)  # refuses what cannot be met
    groups, neurons = _wished_counts(shape, sparsity, gamma)
    cut = allocate(shape, scores, Wish(sparsity=sparsity, groups=groups, neurons=neurons, round_to=round_to))
    return plan_of(
        shape,
        [_indices(mask) for mask in cut.groups],
        [_indices(mask) for mask in cut.neurons],
        origin=Origin(model_name=model_name, sparsity=sparsity, seed=seed, calibration=calibration),
        gamma=gamma,
        saliency=saliency,
        allocation=allocation,
        round_to=round_to,
        removed=(cut.removed_groups, cut.removed_neurons),
    )


@dataclass(frozen=True)
class Origin:
    """What a plan was asked of."""

    model_name: str
    sparsity: float
    seed: int
    calibration: dict[str, Any] | None


def plan_of(
    shape: ModelShape,
    kept_groups: Sequence[tuple[int, ...]],
    kept_neurons: Sequence[tuple[int, ...]],
    *,
    origin: Origin,
    gamma: float | None = None,
    saliency: str,
    allocation: str,
    round_to: int,
    removed: tuple[int, int] | None = None,
) -> PrunePlan:
    """The plan that keeps the given units of each layer, sorted.

    ``removed`` counts (KV groups, neurons) before rounding [as the units say].
    """
    layers = tuple(
        LayerPlan(
            layer=shape.number(index),
            of_groups=layer.kv_heads,
            kept_groups=tuple(kept_groups[index]),
            of_neurons=layer.ffn_width,
            kept_neurons=tuple(kept_neurons[index]),
            site=layer.site,
        )
        for index, layer in enumerate(shape.layers)
    )
    if removed is None:
        removed = (
            sum(layer.of_groups - len(layer.kept_groups) for layer in layers),
            sum(layer.of_neurons - len(layer.kept_neurons) for layer in layers),
        )
    return PrunePlan(
        model={
            "name": origin.model_name,
            "family": shape.family.name,
            "hidden_size": shape.hidden_size,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab_size,
            "query_heads_per_group": shape.query_heads_per_group,
            "tied_embeddings": shape.tied_embeddings,
        },
        sparsity=origin.sparsity,
        gamma=gamma,
        saliency=saliency,
        allocation=allocation,
        round_to=round_to,
        seed=origin.seed,
        calibration=origin.calibration,
        budget=_budget(shape, layers, origin.sparsity, *removed),
        layers=layers,
    )


def pruned_shape(shape: ModelShape, plan: PrunePlan) -> ModelShape:
    """The shape that the model has after the plan; raises NirvanaError when the plan does not fit it."""
    check_plan_fits(plan, shape)
    g = shape.query_heads_per_group
    layers = tuple(
        LayerShape(
            query_heads=g * len(layer.kept_groups),
            kv_heads=len(layer.kept_groups),
            ffn_width=len(layer.kept_neurons),
            site=layer.site,
        )
        for layer in plan.layers
    )
    return replace(shape, layers=layers)


def dense_shape(pruned: ModelShape, plan: PrunePlan) -> ModelShape:
    """The shape that the model had before the plan; the inverse of :func:`pruned_shape`."""
    g = pruned.query_heads_per_group
    layers = tuple(
        LayerShape(
            query_heads=g * layer.of_groups,
            kv_heads=layer.of_groups,
            ffn_width=layer.of_neurons,
            site=layer.site,
        )
        for layer in plan.layers
    )
    return replace(pruned, layers=layers)


def check_plan_was_cut(plan: PrunePlan, pruned: ModelShape) -> None:
    """Raise NirvanaError unless ``pruned`` has in every layer what the plan keeps there."""
    for position, (kept, layer) in enumerate(zip(plan.layers, pruned.layers, strict=True)):
        counts = (len(kept.kept_groups), len(kept.kept_neurons))
        if counts != (layer.kv_heads, layer.ffn_width):
            raise NirvanaError(
                f"{pruned.label(position)} has {layer.kv_heads} KV heads and {layer.ffn_width} neurons in "
                f"the checkpoint, and the plan keeps {counts[0]} and {counts[1]}: another cut.",
                hint="Redo the cut: nirvana-deploy prune MODEL --plan plan.json --out DIR",
            )


def check_plan_fits(plan: PrunePlan, shape: ModelShape) -> None:
    """Raise NirvanaError unless the plan speaks of a model of exactly this shape."""
    facts = {
        "family": shape.family.name,
        "hidden_size": shape.hidden_size,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "query_heads_per_group": shape.query_heads_per_group,
    }
    differences = [
        f"{key} is {plan.model.get(key)!r} in the plan and {value!r} in the model"
        for key, value in facts.items()
        if plan.model.get(key) != value
    ]
    if len(plan.layers) != len(shape.layers):
        differences.append(f"the plan has {len(plan.layers)} layers and the model {len(shape.layers)}")
    else:
        for position, (layer, model) in enumerate(zip(plan.layers, shape.layers, strict=True)):
            dimensions = (model.site, model.kv_heads, model.ffn_width)
            if (layer.site, layer.of_groups, layer.of_neurons) != dimensions:
                differences.append(
                    f"layer {layer.layer} has {layer.of_groups} KV groups and {layer.of_neurons} neurons "
                    f"in the plan, {model.kv_heads} and {model.ffn_width} in the model"
                )
            elif model.kv_heads - len(layer.kept_groups) > shape.removable_groups(position):
                differences.append(f"layer {layer.layer} loses KV groups, which share a norm in the model")
    if differences:
        raise NirvanaError(
            f"The plan does not fit the model: {differences[0]}"
            + (f" (and {len(differences) - 1} more differences)." if len(differences) > 1 else "."),
            hint="Use the model that the plan was made for, or make a new plan with 'nirvana-deploy prune'.",
        )


def _costs(shape: ModelShape) -> tuple[int, int]:
    """(A, M): linear weights of all attention and of all FFN, in units of D weights."""
    attention = sum(layer.kv_heads for layer in shape.layers) * shape.group_cost
    mlp = sum(layer.ffn_width for layer in shape.layers) * shape.neuron_cost
    return attention, mlp


def _wished_counts(shape: ModelShape, sparsity: float, gamma: float) -> tuple[float, float]:
    """(KV groups, FFN neurons) to remove in the whole model, as real numbers."""
    attention, mlp = _costs(shape)
    if not _removable(shape, 1)[0]:
        return 0.0, sparsity * (attention + mlp) / shape.neuron_cost
    attention_sparsity = sparsity * (attention + mlp) / (attention + gamma * mlp)
    groups = attention_sparsity * sum(layer.kv_heads for layer in shape.layers)
    neurons = gamma * attention_sparsity * sum(layer.ffn_width for layer in shape.layers)
    return groups, neurons


def _removable(shape: ModelShape, round_to: int) -> tuple[int, int]:
    """(KV groups, FFN neurons) that may go while every layer keeps its least."""
    groups = sum(shape.removable_groups(position) for position in range(len(shape.layers)))
    neurons = sum(max(layer.ffn_width - round_to, 0) for layer in shape.layers)
    return groups, neurons


def _indices(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.flatnonzero(mask))


def _budget(
    shape: ModelShape,
    layers: tuple[LayerPlan, ...],
    sparsity: float,
    removed_groups: int,
    removed_neurons: int,
) -> Budget:
    of_groups = sum(layer.of_groups for layer in layers)
    of_neurons = sum(layer.of_neurons for layer in layers)
    kept_groups = sum(len(layer.kept_groups) for layer in layers)
    kept_neurons = sum(len(layer.kept_neurons) for layer in layers)
    dense = shape.linear_parameters
    kept = (kept_groups * shape.group_cost + kept_neurons * shape.neuron_cost) * shape.hidden_size
    return Budget(
        asked_removed_share=sparsity,
        met_removed_share=1 - kept / dense,
        removed_groups=removed_groups,
        of_groups=of_groups,
        removed_neurons=removed_neurons,
        removed_neurons_after_rounding=of_neurons - kept_neurons,
        of_neurons=of_neurons,
        linear_parameters_dense=dense,
        linear_parameters_kept=kept,
        parameters_dense=dense + shape.embedding_parameters,
        parameters_kept=kept + shape.embedding_parameters,
    )
