"""Weights as integers with scales: per output channel (8 bits) or block by block along the inputs (4 bits).

Pure maths on arrays; how the numbers are written into a graph is ``weight_only.py``. A weight here is
[K, N], inputs by outputs, as ``MatMul`` takes it. A *block* is ``block_size`` consecutive inputs of one
output channel that share a scale; the last block of a channel is shorter when K does not divide, and a
block size of K is one scale per channel.

All integers are symmetric, zero stands for zero: TensorRT reads no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""What ``MatMulNBits`` and the INT4 weights of TensorRT allow."""
_SEARCHED_SHARES = np.linspace(0.45, 1.0, 23).astype(np.float32)
"""Candidate scales of the search, as shares of the one that reaches the block's largest weight."""


@dataclass(frozen=True)
class RoundedWeight:
    """One weight as integers: ``codes * scales`` block by block."""

    codes: NDArray[np.int8]
    """[K, N], within ``code_range(bits)``."""
    scales: NDArray[Any]
    """[ceil(K / block_size), N], positive, of the dtype that the graph computes in."""
    bits: int
    """8 or 4."""
    block_size: int
    """Inputs that share a scale; K for one scale per output channel."""

    def dequantized(self) -> NDArray[np.float32]:
        """The weight [K, N] that these numbers stand for, computed as runtimes do: in float32."""
        K = len(self.codes)
        values = self.codes.astype(np.float32)
        values *= per_row(self.scales.astype(np.float32), self.block_size, K)
        return values


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code: [-127, 127] for 8 bits, [-8, 7] for 4."""
    return (-127, 127) if bits == 8 else (-8, 7)


_LIMITS = {bits: tuple(map(np.float32, code_range(bits))) for bits in (8, 4)}


def require_block_size(block_size: int) -> None:
    """Raise NirvanaError for a block size that runtimes do not read."""
    if block_size not in BLOCK_SIZES:
        raise NirvanaError(
            f"The block size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}.",
            hint="--block-size 32 is usual: smaller blocks lose less, larger ones store fewer scales.",
        )


def per_row(of_blocks: NDArray[np.float32], block_size: int, rows: int) -> NDArray[np.float32]:
    """Repeat what is said per block, [ceil(K / block_size), N], for each of its K ``rows``."""
    return np.repeat(of_blocks, block_size, axis=0)[:rows]


def blocks_of(rows: int, block_size: int) -> Iterator[tuple[int, slice]]:
    """Number and rows of every block of K ``rows``; the last may be shorter."""
    for index, start in enumerate(range(0, rows, block_size)):
        yield index, slice(start, min(start + block_size, rows))


def round_weight(
    weight: NDArray[Any],
    *,
    bits: int,
    block_size: int,
    search: bool = False,
    importance: NDArray[np.float32] | None = None,
    scale_dtype: np.dtype[np.generic] | None = None,
    channels_at_once: int = 2048,
) -> RoundedWeight:
    """Round ``weight`` [K, N] to the nearest codes of symmetric scales; it is not changed.

    A scale reaches the largest weight of its block, or with ``search`` is the one of least squared error
    among smaller ones, which clip it; ``importance`` [K] weighs the inputs in that error. Raises
    NirvanaError for weights that are not finite.
    """
    K, N = weight.shape
    dtype = np.dtype(np.float32) if scale_dtype is None else scale_dtype
    codes = np.empty((K, N), dtype=np.int8)
    scales: NDArray[Any] = np.empty((-(-K // block_size), N), dtype=dtype)
    for start in range(0, N, channels_at_once):
        some = slice(start, start + channels_at_once)
        values = checked(weight[:, some])
        scales[:, some] = block_scales(
            values, bits=bits, block_size=block_size, search=search, importance=importance, dtype=dtype
        )
        steps = per_row(scales[:, some].astype(np.float32), block_size, K)
        codes[:, some] = nearest_codes(values, steps, bits=bits)
    return RoundedWeight(codes=codes, scales=scales, bits=bits, block_size=block_size)


def block_scales(
    weight: NDArray[np.float32],
    *,
    bits: int,
    block_size: int,
    search: bool = False,
    importance: NDArray[np.float32] | None = None,
    dtype: np.dtype[np.generic] | None = None,
) -> NDArray[Any]:
    """The symmetric scales [ceil(K / block_size), N] of ``weight`` [K, N], as :func:`round_weight` says."""
    K, N = weight.shape
    dtype = np.dtype(np.float32) if dtype is None else dtype
    scales: NDArray[Any] = np.empty((-(-K // block_size), N), dtype=dtype)
    buffer = torch.empty((min(K, block_size), N))  # torch's passes over blocks are quicker than numpy's
    squared = np.empty((len(_SEARCHED_SHARES), N), dtype=np.float32)
    low, high = code_range(bits)
    for index, rows in blocks_of(K, block_size):
        block = weight[rows]
        widest = np.abs(block).max(axis=0) / code_range(bits)[1]
        scales[index] = _positive(widest, dtype)
        if not search:
            continue
        weights = np.ones(len(block), dtype=np.float32) if importance is None else importance[rows]
        candidates = _positive(widest * _SEARCHED_SHARES[:, None], dtype)
        with np.errstate(over="ignore"):
            steps = torch.from_numpy(candidates.astype(np.float32, copy=False))
            error, values = buffer[: len(block)], torch.tensor(block)
            for step, found in zip(steps, squared, strict=True):
                torch.div(values, step, out=error).round_().clamp_(low, high)
                error.mul_(step).sub_(values).square_()
                np.matmul(weights, error.numpy(), out=found)
        squared[np.isnan(squared)] = np.inf
        best = squared.argmin(axis=0)[None]
        fits = np.isfinite(np.take_along_axis(squared, best, axis=0)[0])  # else every error overflows
        np.copyto(scales[index], np.take_along_axis(candidates, best, axis=0)[0], where=fits)
    return scales


def nearest_codes(
    weight: NDArray[np.float32],
    steps: NDArray[np.float32],
    *,
    bits: int,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """round_half_even(weight / steps), clipped to the codes of ``bits``; float32, in ``out`` [new]."""
    codes: NDArray[np.float32] = np.divide(weight, steps, out=out)
    return to_codes(codes, bits=bits)


def to_codes(values: NDArray[np.float32], *, bits: int) -> NDArray[np.float32]:
    """``values``, which are changed in place to the nearest codes of ``bits``."""
    low, high = _LIMITS[bits]
    np.rint(values, values)
    np.maximum(values, low, out=values)  # the two take half the time of clip, whose wrapper is Python
    return np.minimum(values, high, out=values)


def checked(weight: NDArray[Any]) -> NDArray[np.float32]:
    """``weight`` [K, N] as float32; raises NirvanaError when it holds NaN or infinite values."""
    values = np.asarray(weight, dtype=np.float32)
    if not np.isfinite(values).all():
        raise NirvanaError(
            f"A weight of shape {list(values.shape)} holds NaN or infinite values and cannot be quantized.",
            hint="The ONNX folder is damaged; export the checkpoint again.",
        )
    return values


def _positive(scales: NDArray[Any], dtype: np.dtype[np.generic]) -> NDArray[Any]:
    """``scales`` in ``dtype``; 1 where a block is all zero (any scale would do, 0 is not allowed)."""
    stored = scales.astype(dtype)
    stored[stored == 0] = 1
    return stored
