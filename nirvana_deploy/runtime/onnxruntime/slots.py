"""KV buffers of a fixed number of slots, written in place: what ``gqa`` and ``static-cache`` decode into.

Sequences lie in slots from 0 on, each as long as it is; nothing is copied from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.runtime.runner import Lineage


@dataclass(frozen=True)
class CacheLayout:
    """The KV cache of a graph, without batch and length."""

    names: tuple[str, ...]
    """``0.key``, ``0.value``, ``1.key``, ...: after ``past_key_values.`` and ``present.``."""
    shapes: tuple[tuple[int, int], ...]
    """(K, d) of each."""
    dtype: type[np.floating[Any]]

    def arrays(self, sequences: int, slots: int) -> list[NDArray[Any]]:
        """Zeros [N, K, slots, d] for each."""
        return [np.zeros((sequences, K, slots, d), dtype=self.dtype) for K, d in self.shapes]


class SlotCache:
    """The buffers of one batch, and which of the states that were made of them are still true.

    A step writes into the buffers, so a state that is continued twice loses what followed it the first time.
    """

    def __init__(self, arrays: list[NDArray[Any]]) -> None:
        self.arrays = arrays
        self.values: list[Any] = []
        """The runtime's view of the buffers, or its copies on another device."""
        self.binding: Any = None
        """The runtime's binding to the buffers, made once."""
        self._lineage = Lineage()

    @property
    def slots(self) -> int:
        """C."""
        return int(self.arrays[0].shape[2])

    def grown(self, slots: int) -> SlotCache:
        """A copy with room for ``slots`` tokens."""
        arrays = []
        for array in self.arrays:
            N, K, used, d = array.shape
            arrays.append(np.zeros((N, K, slots, d), dtype=array.dtype))
            arrays[-1][:, :, :used] = array
        return SlotCache(arrays)

    def advance(self, mark: int) -> int:
        """Continue the state ``mark``; returns the mark of the new state (``Lineage``)."""
        return self._lineage.advance(mark)


def moved_right(mask: NDArray[np.int64], rows: NDArray[Any]) -> NDArray[Any]:
    """Rows [N, T, ...] of prompts padded on the left, with the padding of each behind its tokens instead."""
    return _rolled(rows, mask.sum(axis=1) - mask.shape[1])


def moved_left(mask: NDArray[np.int64], rows: NDArray[Any]) -> NDArray[Any]:
    """The inverse of :func:`moved_right`."""
    return _rolled(rows, mask.shape[1] - mask.sum(axis=1))


def ones_then_zeros(lengths: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Mask [N, width] of sequences that start in slot 0."""
    return (np.arange(width) < lengths[:, None]).astype(np.int64)


def require_left_padding(mask: NDArray[np.int64]) -> None:
    """Raise NirvanaError unless every row of the mask [N, T] is zeros, then at least one 1."""
    if (np.diff(mask, axis=1) < 0).any() or not mask[:, -1].all():
        raise NirvanaError("attention_mask must be 0 for padding on the left and 1 from there on.")


def _rolled(rows: NDArray[Any], by: Sequence[int] | NDArray[np.int64]) -> NDArray[Any]:
    return np.stack([np.roll(row, int(places), axis=0) for row, places in zip(rows, by, strict=True)])
