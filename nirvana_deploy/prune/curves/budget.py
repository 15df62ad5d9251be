"""How much from where: from curves and a budget to how many units of each layer stay. Pure numbers.

The lower convex hull of each curve is cut into segments, which go by ascending KL per cost until the
budget is met, attention and FFN under one budget. Greedy on hulls is optimal up to the last segment. A larger
budget takes the same segments and more, so plans are nested: one set of curves serves every sparsity.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.curves.curve import Curve, Curves

LEAST_SHARE = 24
"""An FFN keeps at least one neuron in so many."""


@dataclass(frozen=True)
class Counts:
    """How many units of one layer stay."""

    groups: int
    neurons: int


@dataclass(frozen=True)
class UnitCost:
    """What one unit costs, in any unit of measure."""

    group: float
    neuron: float
    measure: str = "weights"
    """What the budget is a share of: "weights", "bytes" or "ms"."""


@dataclass(frozen=True)
class Budget:
    """How much goes, counted how, and what stays in any case."""

    sparsity: float
    """Share of the model's cost to remove."""
    cost: UnitCost | None = None
    """Of a unit; None: its linear weights."""
    uniform: bool = False
    """Whether every layer gets the same counts."""
    round_to: int = 8
    """Kept FFN widths are multiples of this, or the dense width."""
    min_groups: int = 1
    min_neurons: int | None = None
    """None: a 24th of the layer's."""


@dataclass(frozen=True)
class Allocated:
    """What stays, and what it is expected to lose."""

    counts: tuple[Counts, ...]
    predicted_kl: float
    """Nats per token, if the losses of layers add up."""


@dataclass(frozen=True)
class _Segment:
    slope: float
    """KL per cost."""
    layer: int
    attention: bool
    removed: int
    """Units that go with it."""


def weight_cost(shape: ModelShape) -> UnitCost:
    """Linear weights of a KV group and of a neuron."""
    hidden = shape.hidden_size
    return UnitCost(group=float(shape.group_cost * hidden), neuron=float(shape.neuron_cost * hidden))


def least_neurons(width: int, round_to: int, wanted: int | None = None) -> int:
    """Neurons that a layer of ``width`` keeps at least: a 24th by default, a multiple of ``round_to``."""
    asked = math.ceil(width / LEAST_SHARE) if wanted is None else wanted
    return min(width, max(round_to, math.ceil(asked / round_to) * round_to))


def allocate(shape: ModelShape, curves: Curves, budget: Budget) -> Allocated:
    """Remove what the budget asks for where it is predicted to hurt least.

    The plan is the first that reaches the share asked. Raises NirvanaError for a budget that cannot be met,
    naming the largest that can, or "uniform" for a model whose layers differ.
    """
    require_feasible(shape, budget, curves)
    choose = _uniform if budget.uniform else _by_slope
    counts = choose(shape, curves, budget, _floors(shape, budget, curves))
    return Allocated(counts=tuple(counts), predicted_kl=_predicted_kl(shape, curves, counts))


def allocate_in_steps(shape: ModelShape, curves: Curves, budget: Budget, steps: int) -> list[Allocated]:
    """What stays after each of ``steps`` of the same size, the last of which meets the budget.

    The share removed grows by as much at each: then equal times of recovery are equal times for a weight that
    went. What a later step keeps, an earlier one keeps, too, also where plans are not nested (uniform ones).
    """
    found = [allocate(shape, curves, budget)]
    for step in range(steps - 1, 0, -1):
        part = allocate(shape, curves, replace(budget, sparsity=budget.sparsity * step / steps))
        counts = [
            Counts(max(one.groups, later.groups), max(one.neurons, later.neurons))
            for one, later in zip(part.counts, found[0].counts, strict=True)
        ]
        found.insert(0, Allocated(tuple(counts), _predicted_kl(shape, curves, counts)))
    return found


def _predicted_kl(shape: ModelShape, curves: Curves, counts: Sequence[Counts]) -> float:
    return sum(
        curves.groups[i].at(layer.kv_heads - kept.groups)
        + curves.neurons[i].at(layer.ffn_width - kept.neurons)
        for i, (layer, kept) in enumerate(zip(shape.layers, counts, strict=True))
    )


def require_feasible(shape: ModelShape, budget: Budget, curves: Curves | None = None) -> None:
    """Raise the errors of :func:`allocate`; before there are curves, all but those of where these end."""
    floors = _floors(shape, budget, curves)
    if budget.uniform:
        _alike(shape)
    largest = largest_sparsity_of(shape, budget, curves)
    if not 0 < budget.sparsity <= largest:
        raise NirvanaError(
            f"sparsity must be above 0 and at most {largest:.3f}, got {budget.sparsity}: every layer keeps "
            f"at least {floors[0].groups} KV group(s) and {max(one.neurons for one in floors)} FFN neurons.",
            hint=f"Pass --sparsity {math.floor(largest * 100) / 100:g} or less, or smaller minimum widths.",
        )


def largest_sparsity_of(shape: ModelShape, budget: Budget, curves: Curves | None = None) -> float:
    """The largest share that can go, whatever the budget asks."""
    cost, floors = budget.cost or weight_cost(shape), _floors(shape, budget, curves)
    removable = sum(
        (layer.kv_heads - floor.groups) * cost.group + (layer.ffn_width - floor.neurons) * cost.neuron
        for layer, floor in zip(shape.layers, floors, strict=True)
    )
    return removable / _total(shape, cost)


def _floors(shape: ModelShape, budget: Budget, curves: Curves | None) -> list[Counts]:
    """What each layer keeps at least; of what lies behind the end of its curve nothing is known."""
    floors, round_to = [], budget.round_to
    for index, layer in enumerate(shape.layers):
        neurons = least_neurons(layer.ffn_width, round_to, budget.min_neurons) if layer.ffn_width else 0
        if curves is not None and layer.ffn_width:
            known = layer.ffn_width - int(curves.neurons[index].removed[-1])
            neurons = max(neurons, least_neurons(layer.ffn_width, round_to, known))
        least = layer.kv_heads - shape.removable_groups(index)
        floors.append(Counts(min(max(budget.min_groups, least), layer.kv_heads), neurons))
    return floors


def _total(shape: ModelShape, cost: UnitCost) -> float:
    return sum(layer.kv_heads * cost.group + layer.ffn_width * cost.neuron for layer in shape.layers)


def _alike(shape: ModelShape) -> tuple[int, int]:
    """(KV heads, FFN width) of every layer."""
    heads = {layer.kv_heads for layer in shape.layers}
    widths = {layer.ffn_width for layer in shape.layers if layer.ffn_width}
    if len(heads) > 1 or len(widths) > 1:
        raise NirvanaError(
            "allocation 'uniform' needs a model whose layers are all alike; this one's layers differ.",
            hint="Prune the dense model, or pass --allocation curves.",
        )
    (kv_heads,), (width,) = heads, widths
    return kv_heads, width


def hull(removed: NDArray[np.float64], loss: NDArray[np.float64]) -> list[int]:
    """Indices of the points of the lower convex hull, first and last included."""
    found: list[int] = []
    for point in range(len(removed)):
        while len(found) > 1:
            a, b = found[-2], found[-1]
            if (loss[b] - loss[a]) * (removed[point] - removed[a]) < (loss[point] - loss[a]) * (
                removed[b] - removed[a]
            ):
                break
            found.pop()
        found.append(point)
    return found


def _by_slope(shape: ModelShape, curves: Curves, budget: Budget, floors: Sequence[Counts]) -> list[Counts]:
    cost, round_to = budget.cost or weight_cost(shape), budget.round_to
    segments: list[_Segment] = []
    for index, (layer, floor) in enumerate(zip(shape.layers, floors, strict=True)):
        groups = np.arange(layer.kv_heads - floor.groups + 1)
        segments += _segments(curves.groups[index], groups, cost.group, index, attention=True)
        removable = [layer.ffn_width - kept for kept in _widths(layer.ffn_width, floor.neurons, round_to)]
        segments += _segments(curves.neurons[index], np.array(removable), cost.neuron, index, attention=False)
    removed = [Counts(0, 0) for _ in shape.layers]
    left = wanted = budget.sparsity * _total(shape, cost)
    # ties (dead units, for one) go layer by layer
    for segment in sorted(segments, key=lambda one: (one.slope, one.layer, one.attention)):
        if left <= 1e-6 * wanted:
            break
        unit = cost.group if segment.attention else cost.neuron
        count = min(segment.removed, math.ceil(left / unit - 1e-6))  # the last one in part
        before = removed[segment.layer]
        if not segment.attention:  # to a round width
            stays = shape.layers[segment.layer].ffn_width - before.neurons
            count = stays - (stays - count) // round_to * round_to
        removed[segment.layer] = (
            Counts(before.groups + count, before.neurons)
            if segment.attention
            else Counts(before.groups, before.neurons + count)
        )
        left -= count * unit
    return [
        Counts(layer.kv_heads - gone.groups, layer.ffn_width - gone.neurons)
        for layer, gone in zip(shape.layers, removed, strict=True)
    ]


def _segments(
    curve: Curve, removable: NDArray[np.int64], unit: float, layer: int, *, attention: bool
) -> list[_Segment]:
    """The hull of a curve over the counts that may be removed, ascending from 0."""
    loss = np.interp(removable, curve.removed, curve.kl)
    points = hull(removable.astype(np.float64), loss)
    return [
        _Segment(
            slope=float((loss[b] - loss[a]) / ((removable[b] - removable[a]) * unit)),
            layer=layer,
            attention=attention,
            removed=int(removable[b] - removable[a]),
        )
        for a, b in itertools.pairwise(points)
    ]


def _widths(width: int, least: int, round_to: int) -> list[int]:
    """FFN widths that may stay, from the dense one down."""
    return [width, *range((width - 1) // round_to * round_to, least - 1, -round_to)] if width else [0]


def _uniform(shape: ModelShape, curves: Curves, budget: Budget, floors: Sequence[Counts]) -> list[Counts]:
    """One number of groups and one width for all layers: the least sum of the curves."""
    cost = budget.cost or weight_cost(shape)
    wanted = budget.sparsity * _total(shape, cost)
    kv_heads, width = _alike(shape)
    with_ffn = sum(layer.ffn_width > 0 for layer in shape.layers)
    least = max(floor.neurons for floor in floors)

    def loss(groups: int, neurons: int) -> float:
        attention = sum(curve.at(groups) for curve in curves.groups)
        return attention + sum(curve.at(neurons) for curve in curves.neurons)

    found = []
    for groups in range(kv_heads - floors[0].groups + 1):
        left = (wanted - groups * cost.group * len(shape.layers)) / (cost.neuron * with_ffn)
        fits = [
            width - kept for kept in _widths(width, least, budget.round_to) if width - kept >= left - 1e-6
        ]
        if fits:
            found.append((loss(groups, min(fits)), groups, min(fits)))
    _, groups, neurons = min(found)
    return [
        Counts(kv_heads - groups, layer.ffn_width - neurons if layer.ffn_width else 0)
        for layer in shape.layers
    ]
