"""Where the cuts fall: from unit scores and a budget to masks of kept units, one function per allocation.

``global`` ranks every unit of a kind over all layers, so layers come to differ. ``uniform`` takes the same
number from every layer and ranks inside the layer: worse at the same size, but one shape for all layers,
which is what consumers that know a single ``intermediate_size`` need. Of an encoder-decoder every attention,
cross-attentions included, loses the same number of heads, and both stacks have one FFN width. Pure numbers;
no model is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.saliency.units import UnitScores

Masks = list[NDArray[np.bool_]]
"""Per layer, True where the unit stays."""


@dataclass(frozen=True)
class Wish:
    """What the budget asks for, over the whole model."""

    sparsity: float
    """Share of the decoder's linear weights to remove."""
    groups: float
    """KV groups to remove; a real number, before it is rounded to whole groups."""
    neurons: float
    """FFN neurons to remove, likewise."""
    round_to: int
    """Kept FFN widths are multiples of this, or the dense width."""


@dataclass(frozen=True)
class Cut:
    """Which units stay."""

    groups: Masks
    """Per layer, [K]."""
    neurons: Masks
    """Per layer, [F]."""
    removed_groups: int
    removed_neurons: int
    """Before rounding to ``round_to``."""


Allocation = Callable[[ModelShape, UnitScores, Wish], Cut]


def cut_globally(shape: ModelShape, scores: UnitScores, wish: Wish) -> Cut:
    """Rank over all layers; both counts are rounded down, then kept widths up to ``round_to``.

    Rounding spares the best of the cut, so the removed share is at most the one asked.
    """
    removed_groups, removed_neurons = whole(wish.groups), whole(wish.neurons)
    kept = kept_units(scores.neurons, removed_neurons, at_least=wish.round_to)
    return Cut(
        groups=kept_units(scores.groups, removed_groups, at_least=1),
        neurons=[
            _rounded_up(mask, score, wish.round_to) for mask, score in zip(kept, scores.neurons, strict=True)
        ],
        removed_groups=removed_groups,
        removed_neurons=removed_neurons,
    )


def cut_uniformly(shape: ModelShape, scores: UnitScores, wish: Wish) -> Cut:
    """The same counts in every layer, ranked inside the layer.

    The group count is the whole number nearest to what gamma asks; the FFN width then makes up for the
    rounding, so that the removed share is as near to the one asked as whole units per layer allow (it may
    be a little above). Raises NirvanaError for a model whose layers already differ.
    """
    if len({layer.kv_heads for layer in shape.layers}) > 1 or len(_ffn_widths(shape)) > 1:
        raise NirvanaError(
            "allocation 'uniform' needs a model whose layers are all alike; this one's layers differ.",
            hint="Prune the dense model, or pass --allocation global.",
        )
    groups, neurons, before_rounding = uniform_counts(shape, wish)
    return Cut(
        groups=[kept_units([score], groups, at_least=1)[0] for score in scores.groups],
        neurons=[kept_units([score], neurons, at_least=1)[0] for score in scores.neurons],
        removed_groups=groups * len(shape.layers),
        removed_neurons=before_rounding * sum(layer.ffn_width > 0 for layer in shape.layers),
    )


def uniform_counts(shape: ModelShape, wish: Wish) -> tuple[int, int, int]:
    """Per layer: (KV groups to remove, FFN neurons to remove, the same before rounding to ``round_to``)."""
    layer = shape.layers[0]
    # attentions per FFN: 1, or more in an encoder-decoder, whose cross-attentions have none
    attentions = len(shape.layers) / sum(layer.ffn_width > 0 for layer in shape.layers)
    group_cost = attentions * shape.group_cost
    asked_cost = wish.sparsity * (layer.kv_heads * group_cost + layer.ffn_width * shape.neuron_cost)
    widths: list[int] = [*range(wish.round_to, layer.ffn_width, wish.round_to), layer.ffn_width]
    wished_groups = wish.groups / len(shape.layers)

    def neurons_beside(groups: int) -> float:
        return (asked_cost - groups * group_cost) / shape.neuron_cost

    def removed_beside(groups: int) -> int:
        distances = [abs(layer.ffn_width - width - neurons_beside(groups)) for width in widths]
        return layer.ffn_width - widths[int(np.argmin(distances))]

    def badness(groups: int) -> tuple[float, float]:
        # where the FFN cannot make up for the rounding of the groups, a count further off serves better
        missed = abs(removed_beside(groups) - neurons_beside(groups))
        return max(missed - wish.round_to / 2, 0.0), abs(groups - wished_groups)

    groups = min(range(shape.removable_groups(0) + 1), key=badness)
    unrounded = round(min(max(neurons_beside(groups), 0), layer.ffn_width - 1))
    return groups, removed_beside(groups), unrounded


ALLOCATIONS: dict[str, Allocation] = {"global": cut_globally, "uniform": cut_uniformly}


def kept_units(scores: Sequence[NDArray[np.float64]], removed: int, *, at_least: int) -> Masks:
    """Remove exactly ``removed`` units, the lowest over all layers; every layer keeps its best ``at_least``.

    Ties are broken by position: of equal scores the earlier layer, then the lower index, goes first.
    """
    flat = np.concatenate(scores)
    protected = np.concatenate([_best(layer, at_least) for layer in scores])
    order = np.argsort(flat, kind="stable")
    cut = order[~protected[order]][:removed]
    kept = np.ones(len(flat), dtype=bool)
    kept[cut] = False
    return np.split(kept, np.cumsum([len(layer) for layer in scores])[:-1])


def whole(count: float) -> int:
    """Round down, forgiving the last bit of a product that is a whole number on paper."""
    return math.floor(count + 1e-6)


def _ffn_widths(shape: ModelShape) -> set[int]:
    return {layer.ffn_width for layer in shape.layers if layer.ffn_width}


def _best(scores: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Mask of the ``count`` highest scores; of equal ones the later position counts as higher."""
    mask = np.zeros(len(scores), dtype=bool)
    mask[np.argsort(scores, kind="stable")[-count:]] = True
    return mask


def _rounded_up(kept: NDArray[np.bool_], scores: NDArray[np.float64], round_to: int) -> NDArray[np.bool_]:
    """Spare the best of the cut until the kept count is a multiple of ``round_to`` (or everything)."""
    wanted = min(math.ceil(kept.sum() / round_to) * round_to, len(kept))
    spared = kept.copy()
    cut = np.flatnonzero(~kept)
    best_first = cut[np.argsort(scores[cut], kind="stable")[::-1]]
    spared[best_first[: wanted - int(kept.sum())]] = True
    return spared
