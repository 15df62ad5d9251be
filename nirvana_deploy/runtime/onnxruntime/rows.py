"""Sequences that join and leave a batch: the arrays of their KV caches and masks, moved together.

Masks [N, S] are 0 for padding on the left. A cache that grows has S slots, padded like its mask; in one that
is written in place every sequence starts in slot 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def joined_masks(masks: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Masks [N_i, S_i] as one, [sum of N_i, longest S_i]."""
    width = max(mask.shape[1] for mask in masks)
    return np.concatenate([np.pad(mask, ((0, 0), (width - mask.shape[1], 0))) for mask in masks])


def joined_caches(parts: Sequence[NDArray[Any]], *, in_place: bool) -> NDArray[Any]:
    """Caches [N_i, K, S_i, d] as one; new slots lie at the end of those in place, else at the beginning."""
    sequences, slots = sum(len(part) for part in parts), max(part.shape[2] for part in parts)
    cache = np.zeros((sequences, parts[0].shape[1], slots, parts[0].shape[3]), dtype=parts[0].dtype)
    row = 0
    for part in parts:
        begin = 0 if in_place else slots - part.shape[2]
        cache[row : row + len(part), :, begin : begin + part.shape[2]] = part
        row += len(part)
    return cache


def unpadded(mask: NDArray[np.int64]) -> int:
    """The columns on the left of a mask [N, S] that are padding in every row."""
    return int(mask.any(axis=0).argmax())
