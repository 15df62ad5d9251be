"""Rounded weights written into a graph: the same numbers in two writings.

``ort``: one ``MatMulNBits`` (com.microsoft) per linear at accuracy_level 4, whose integer products are tens
of times faster than those of the default level in 8 bits. ``tensorrt``: integers behind a
``DequantizeLinear``, int4 in blocks along axis 0 of [K, N], int8 with one scale per output channel (axis 1).
TensorRT takes whole blocks only and may guess another size silently, so weights and inputs are padded with
zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nirvana_deploy.quantize.graph.linears import Linear, OnnxGraph
from nirvana_deploy.quantize.weights.rounding import RoundedWeight, round_weight

WRITINGS = {"ort": "ONNX Runtime and onnxruntime-genai", "tensorrt": "TensorRT, and ONNX Runtime as well"}
ACCURACY_LEVEL = 4
_WEIGHTS_AT_ONCE = 2**25
"""Of one linear, rounded together: 128 MB in float32, of which rounding needs a few. A head has many more."""
PER_CHANNEL_BLOCK = 32
"""Block size of a MatMulNBits with one scale per channel, repeated; activations are rounded in blocks of
this size too."""


@dataclass(frozen=True)
class RowCodes:
    """A weight [K, N] as ``MatMulNBits`` stores it: row by row for each of its N output channels."""

    codes: ir.Value
    """[N, blocks, bytes of a block], uint8."""
    scales: ir.Value
    """[N, blocks]."""
    bits: int
    block_size: int


def write_rounded(
    graph: OnnxGraph,
    linear: Linear,
    read: Callable[[], RoundedWeight],
    *,
    bits: int,
    block_size: int,
    writing: str = "ort",
) -> RowCodes | None:
    """Let ``linear`` compute with the rounded weight that ``read`` returns, asked for when it is written.

    ``block_size`` as in :class:`RoundedWeight`: K for one scale per channel. Returns what the ``ort`` writing
    reads.
    """
    if writing == "ort":
        rows = row_codes(graph, linear, read, bits=bits, block_size=block_size)
        graph.replace(linear, _nbits(graph, linear, rows))
        return rows
    graph.replace(linear, _dequantized(graph, linear, _Parts(read), bits, block_size))
    return None


def row_codes(
    graph: OnnxGraph,
    linear: Linear,
    read: Callable[[], RoundedWeight],
    *,
    bits: int,
    block_size: int,
) -> RowCodes:
    """Initializers of the rounded weight: codes packed and unsigned, one scale a channel repeated."""
    K, N, name, parts = linear.K, linear.N, f"{linear.name}.weight", _Parts(read)
    block = stored_block(linear, bits=bits, block_size=block_size)
    blocks = -(-K // block)
    repeats = blocks if block < block_size else 1

    def scales() -> NDArray[Any]:
        return np.repeat(parts.scales(), repeats, axis=0).T

    codes = graph.initializer(
        f"{name}_quantized",
        ir.DataType.UINT8,
        (N, blocks, block * bits // 8),
        lambda: packed_blocks(parts.codes(), bits=bits, block_size=block),
    )
    return RowCodes(
        codes=codes,
        scales=graph.initializer(f"{name}_scale", linear.dtype, (N, blocks), scales),
        bits=bits,
        block_size=block,
    )


class _Parts:
    """Hands out codes and scales of one weight, which is rounded once: the scales are kept."""

    def __init__(self, read: Callable[[], RoundedWeight]) -> None:
        self._read = read
        self._scales: NDArray[Any] | None = None

    def codes(self) -> NDArray[np.int8]:
        rounded = self._read()
        self._scales = rounded.scales
        return rounded.codes

    def scales(self) -> NDArray[Any]:
        if self._scales is None:
            self.codes()
        assert self._scales is not None
        return self._scales


def rounded_in_parts(
    linear: Linear,
    rounding: Callable[[NDArray[np.float32]], RoundedWeight],
    *,
    channels_at_once: int | None = None,
) -> RoundedWeight:
    """The weight of ``linear`` rounded some output channels at a time, read when their turn comes."""
    channels = _at_once(linear, channels_at_once)
    codes = np.empty((linear.K, linear.N), dtype=np.int8)
    scales = []
    for start in range(0, linear.N, channels):
        some = slice(start, start + channels)
        rounded = rounding(linear.read_weight(some))
        codes[:, some] = rounded.codes
        scales.append(rounded.scales)
    return replace(rounded, codes=codes, scales=np.concatenate(scales, axis=1))


def rounded_side_by_side(
    linears: Sequence[Linear],
    rounding: Callable[[NDArray[np.float32]], RoundedWeight],
    *,
    channels_at_once: int,
) -> Iterator[RoundedWeight]:
    """The weights of ``linears``, which have one K and dtype: as many at a time as have that many channels.

    ``rounding`` gives each channel what it would get alone, as in :func:`rounded_in_parts`, and walks the
    inputs once for all that it gets.
    """
    waiting, most = list(linears), _at_once(linears[0], channels_at_once)
    while waiting:
        widths = itertools.accumulate(linear.N for linear in waiting)
        count = max(1, sum(width <= most for width in widths))
        some, waiting = waiting[:count], waiting[count:]
        if count == 1:
            yield rounded_in_parts(some[0], rounding, channels_at_once=most)
            continue
        rounded = rounding(np.concatenate([linear.read_weight() for linear in some], axis=1))
        ends = list(itertools.accumulate(linear.N for linear in some))[:-1]
        parts = zip(np.split(rounded.codes, ends, 1), np.split(rounded.scales, ends, 1), strict=True)
        for codes, scales in parts:
            yield replace(rounded, codes=codes, scales=scales)


def _at_once(linear: Linear, channels: int | None) -> int:
    """Output channels that are rounded together, at most ``channels``."""
    most = max(_WEIGHTS_AT_ONCE // linear.K, 1)
    return most if channels is None else min(most, channels)


def rounded_alone(linear: Linear, *, bits: int, block_size: int, search: bool) -> RoundedWeight:
    """The weight of ``linear`` rounded without calibration, its scales in the graph's dtype."""
    return rounded_in_parts(
        linear,
        partial(
            round_weight, bits=bits, block_size=block_size, search=search, scale_dtype=linear.dtype.numpy()
        ),
    )


def stored_block(linear: Linear, *, bits: int, block_size: int) -> int:
    """The block size that the ``ort`` writing gives a weight rounded in blocks of ``block_size``."""
    return PER_CHANNEL_BLOCK if bits == 8 and block_size >= linear.K else block_size


def _nbits(graph: OnnxGraph, linear: Linear, rows: RowCodes) -> ir.Value:
    return graph.node(
        "MatMulNBits",
        [linear.x, rows.codes, rows.scales],
        before=linear.node,
        name=f"{linear.name}.matmul",
        domain="com.microsoft",
        attributes={
            "K": linear.K,
            "N": linear.N,
            "bits": rows.bits,
            "block_size": rows.block_size,
            "accuracy_level": ACCURACY_LEVEL,
        },
        dtype=linear.dtype,
    )


def packed_blocks(codes: NDArray[np.int8], *, bits: int, block_size: int) -> NDArray[np.uint8]:
    """Codes [K, N] as MatMulNBits stores them: [N, ceil(K / block), block * bits / 8] bytes.

    Shifted to unsigned; two 4-bit codes share a byte, the first in the lower half; the last block is filled
    up with zeros.
    """
    K, N = codes.shape
    zero = 2 ** (bits - 1)
    blocks = -(-K // block_size)
    unsigned = np.full((N, blocks * block_size), zero, dtype=np.uint8)
    np.add(codes.T, zero, out=unsigned[:, :K], dtype=np.int16, casting="unsafe")
    if bits == 4:
        unsigned = unsigned[:, ::2] | (unsigned[:, 1::2] << 4)
    return unsigned.reshape(N, blocks, -1)


def _dequantized(graph: OnnxGraph, linear: Linear, parts: _Parts, bits: int, block_size: int) -> ir.Value:
    """MatMul(x, DequantizeLinear(codes, scales)), both filled up to whole blocks."""
    K, N, name = linear.K, linear.N, f"{linear.name}.weight"
    per_channel = block_size >= K
    missing = 0 if per_channel else -K % block_size
    rows = K + missing

    def codes() -> NDArray[Any]:
        filled = np.pad(parts.codes(), ((0, missing), (0, 0)))
        return filled.astype(ml_dtypes.int4) if bits == 4 else filled

    by_channel = per_channel and bits == 8
    scale_shape = (N,) if by_channel else (-(-K // block_size), N)
    quantized = graph.initializer(
        f"{name}_quantized", ir.DataType.INT4 if bits == 4 else ir.DataType.INT8, (rows, N), codes
    )
    scale = graph.initializer(
        f"{name}_scale", linear.dtype, scale_shape, lambda: parts.scales().reshape(scale_shape)
    )
    weight = graph.node(
        "DequantizeLinear",
        [quantized, scale],
        before=linear.node,
        name=f"{name}_dequantized",
        attributes={"axis": 1} if by_channel else {"axis": 0, "block_size": block_size},
        dtype=linear.dtype,
    )
    x = _filled_up(graph, linear, missing) if missing else linear.x
    return graph.node(
        "MatMul", [x, weight], before=linear.node, name=f"{linear.name}.matmul", dtype=linear.dtype
    )


def _filled_up(graph: OnnxGraph, linear: Linear, missing: int) -> ir.Value:
    """The input [..., K] with ``missing`` zeros behind."""
    pads = graph.constant(f"{linear.name}.input_pads", np.array([0, missing], dtype=np.int64))
    zero = graph.constant(f"{linear.name}.input_fill", np.zeros((), dtype=linear.dtype.numpy()))
    axes = graph.constant(f"{linear.name}.input_axes", np.array([-1], dtype=np.int64))
    return graph.node(
        "Pad",
        [linear.x, pads, zero, axes],
        before=linear.node,
        name=f"{linear.name}.input_filled",
        dtype=linear.dtype,
    )
