"""The two ways an engine keeps its KV cache: what is fed, where past and present lie, what a step changes.

``concat``: past [N, K, S, d] in one buffer, present [N, K, S+T, d] in another; then they swap places.
``in-place``: one buffer [N, K, C, d] that is past and present at once, so addresses and shapes never change.

Rows that differ in length come in padded on the left. The in-place form writes row b's tokens from slot
``write_indices[b]`` on, so its rows are moved to the left edge first (padded on the right); slots beyond a
row's length hold what is overwritten before it is ever seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice, DeviceBuffer
from nirvana_deploy.runtime.tensorrt.memory import PAST, PRESENT, MemoryPlan
from nirvana_deploy.runtime.tensorrt.record import EngineRecord

Shape = tuple[int, ...]


class KvCache(Protocol):
    """One form of the cache, with its buffers."""

    in_place: bool
    """Whether a step of T = 1 always has the same shapes and addresses: a CUDA graph can repeat it."""

    def token_inputs(
        self, tokens: NDArray[np.int64], mask: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> dict[str, NDArray[np.int64]]:
        """What the graph is told of [N, T] new tokens.

        ``mask`` [N, S+T] is 0 where a row is padded on the left; ``lengths`` [N] are the tokens that each
        row has in the cache.
        """
        ...

    def shapes(self, batch_size: int, past_tokens: int) -> dict[str, Shape]:
        """The shape of every past, S = ``past_tokens``."""
        ...

    def addresses(self) -> dict[str, int]:
        """Where every past and every present lies in the next step."""
        ...

    def advance(self) -> None:
        """A step is done: what it wrote is the past of the next."""
        ...


class ConcatenatedCache:
    """Two copies that take turns."""

    in_place = False

    def __init__(self, record: EngineRecord, plan: MemoryPlan, device: CudaDevice, *, hint: str) -> None:
        self._heads = cache_heads(record)
        self._copies = [_allocate(plan, device, copy, hint) for copy in ("past", "present")]

    def token_inputs(
        self, tokens: NDArray[np.int64], mask: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> dict[str, NDArray[np.int64]]:
        """See :class:`KvCache`."""
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -tokens.shape[1] :]
        return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}

    def shapes(self, batch_size: int, past_tokens: int) -> dict[str, Shape]:
        """See :class:`KvCache`."""
        return {name: (batch_size, K, past_tokens, d) for name, (K, d) in self._heads.items()}

    def addresses(self) -> dict[str, int]:
        """See :class:`KvCache`."""
        past, present = self._copies
        return {
            **{name: buffer.address for name, buffer in past.items()},
            **{present_name(name): buffer.address for name, buffer in present.items()},
        }

    def advance(self) -> None:
        """See :class:`KvCache`."""
        self._copies.reverse()


class InPlaceCache:
    """One copy, which the engine extends where it lies."""

    in_place = True

    def __init__(self, record: EngineRecord, plan: MemoryPlan, device: CudaDevice, *, hint: str) -> None:
        self._heads = cache_heads(record)
        self._slots = plan.limits.total_tokens
        self._buffers = _allocate(plan, device, "cache", hint)
        for buffer in self._buffers.values():
            device.zero(buffer)  # slots not yet written get weight 0, and 0 times NaN would be NaN

    def token_inputs(
        self, tokens: NDArray[np.int64], mask: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> dict[str, NDArray[np.int64]]:
        """See :class:`KvCache`."""
        return {"input_ids": tokens, "write_indices": lengths}

    def shapes(self, batch_size: int, past_tokens: int) -> dict[str, Shape]:
        """See :class:`KvCache`."""
        return {name: (batch_size, K, self._slots, d) for name, (K, d) in self._heads.items()}

    def addresses(self) -> dict[str, int]:
        """See :class:`KvCache`."""
        return {
            own: buffer.address
            for name, buffer in self._buffers.items()
            for own in (name, present_name(name))
        }

    def advance(self) -> None:
        """See :class:`KvCache`: nothing moves."""


def present_name(past: str) -> str:
    """The output that extends an input: ``present.3.key`` for ``past_key_values.3.key``."""
    return PRESENT + past.removeprefix(PAST)


def cache_heads(record: EngineRecord) -> dict[str, tuple[int, int]]:
    """(K, d) of every past, in the record's order."""
    return {
        tensor.name: (_static(tensor.shape, 1), _static(tensor.shape, 3))
        for tensor in record.inputs
        if tensor.name.startswith(PAST)
    }


def first_misfit(
    shapes: Mapping[str, Shape], allowed: Mapping[str, Sequence[Sequence[int]]]
) -> tuple[str, Shape, Sequence[int], Sequence[int]] | None:
    """(name, shape, minimum, maximum) of the first input that a profile does not take; None: all fit."""
    for name, shape in shapes.items():
        low, _, high = allowed[name]
        if any(not a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            return name, shape, low, high
    return None


def _allocate(plan: MemoryPlan, device: CudaDevice, copy: str, hint: str) -> dict[str, DeviceBuffer]:
    return {
        name: device.allocate(size_bytes, f"KV cache ({copy} of {name.removeprefix(PAST)})", hint=hint)
        for name, size_bytes in plan.cache_bytes.items()
    }


def _static(shape: tuple[int | None, ...], axis: int) -> int:
    size = shape[axis]
    assert size is not None, "KV heads and head_dim are static in every graph of this package"
    return size
