"""Apply a plan to weights: a smaller view of the same checkpoint, or the dense one with units zeroed.

Both are views: a tensor is read, cut or zeroed, and handed on when somebody asks for it, so slicing a
model needs the memory of one tensor. Neither changes the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weights import Rows, WeightSource
from nirvana_deploy.prune.plan import PrunePlan, check_plan_fits
from nirvana_deploy.prune.saliency.units import kept_positions


class SlicedWeights:
    """The checkpoint with the plan's units cut out; raises NirvanaError when the plan does not fit."""

    def __init__(self, source: WeightSource, shape: ModelShape, plan: PrunePlan) -> None:
        check_plan_fits(plan, shape)
        self._source = source
        self._kept = kept_positions(shape, plan.kept_groups, plan.kept_neurons)

    def names(self) -> Sequence[str]:
        """All tensor names, sorted; the same as the source's."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape after the cut."""
        dimensions = list(self._source.shape(name))
        if kept := self._kept.get(name):
            dimensions[kept.dimension] = len(kept.positions)
        return tuple(dimensions)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype; slicing does not change it."""
        return self._source.dtype(name)

    def load(self, name: str) -> torch.Tensor:
        """The tensor with removed rows or columns cut out, contiguous."""
        tensor = self._source.load(name)
        kept = self._kept.get(name)
        return tensor.index_select(kept.dimension, kept.positions) if kept else tensor

    def rows(self, name: str, positions: Rows) -> torch.Tensor:
        """Some rows of the tensor after the cut."""
        return self.load(name)[positions] if name in self._kept else self._source.rows(name, positions)


class ReplacedWeights:
    """A checkpoint of which some tensors come from elsewhere; raises NirvanaError where shapes differ."""

    def __init__(self, source: WeightSource, replacement: WeightSource) -> None:
        self._source = source
        self._replacement = replacement
        self._replaced = frozenset(replacement.names())
        for name in self._replaced:
            if replacement.shape(name) != source.shape(name):
                raise NirvanaError(
                    f"Tensor {name!r} was reconstructed with shape {list(replacement.shape(name))}, "
                    f"and the plan cuts it to {list(source.shape(name))}: another plan's.",
                    hint="Reconstruct again: repeat the prune command with --force.",
                )

    def names(self) -> Sequence[str]:
        """All tensor names, sorted; the same as the source's."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The same as the source's."""
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The same as the source's."""
        return self._source.dtype(name)

    def load(self, name: str) -> torch.Tensor:
        """The tensor, from where it is to come from."""
        return (self._replacement if name in self._replaced else self._source).load(name)

    def rows(self, name: str, positions: Rows) -> torch.Tensor:
        """Some rows of the tensor."""
        return (self._replacement if name in self._replaced else self._source).rows(name, positions)


class MaskedWeights:
    """The dense checkpoint with every weight of the removed units set to zero.

    It computes the same function as :class:`SlicedWeights`; what slicing is tested against. What stays of
    the tensors in ``refitted`` comes from there.
    """

    def __init__(
        self, source: WeightSource, shape: ModelShape, plan: PrunePlan, refitted: WeightSource | None = None
    ) -> None:
        check_plan_fits(plan, shape)
        self._source = source
        cut = SlicedWeights(source, shape, plan)
        self._cut: WeightSource = cut if refitted is None else ReplacedWeights(cut, refitted)
        self._kept = kept_positions(shape, plan.kept_groups, plan.kept_neurons)

    def names(self) -> Sequence[str]:
        """All tensor names, sorted; the same as the source's."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Dense shape."""
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype."""
        return self._source.dtype(name)

    def load(self, name: str) -> torch.Tensor:
        """The tensor with removed rows or columns zeroed."""
        stays = self._cut.load(name)
        kept = self._kept.get(name)
        if kept is None:
            return stays
        whole = stays.new_zeros(self._source.shape(name))
        return whole.index_copy_(kept.dimension, kept.positions, stays)

    def rows(self, name: str, positions: Rows) -> torch.Tensor:
        """Some rows of the tensor with removed units zeroed."""
        return self.load(name)[positions] if name in self._kept else self._cut.rows(name, positions)


def in_dense_shape(dense: Checkpoint, plan: PrunePlan, pruned: Checkpoint) -> Checkpoint:
    """``pruned``, cut from ``dense`` by ``plan`` and trained, with the weights of removed units zero.

    It computes what ``pruned`` does, and can be streamed and cut like ``dense``: dead units cost nothing and
    go first. Its folder is that of ``dense``, so it cannot be loaded as a whole.
    """
    return replace(dense, weights=MaskedWeights(dense.weights, dense.shape, plan, pruned.weights))
