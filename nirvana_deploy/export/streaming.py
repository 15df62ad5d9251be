"""Weights on their way from safetensors into an external-data file, a block at a time.

The checkpoint is mapped, so what is resident is one tensor's pages and one block of converted numbers: peak
memory depends on the largest tensor as it is stored, neither on depth nor on the dtype asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.dtypes import Dtype
from nirvana_deploy.export.packed import unpacked_names
from nirvana_deploy.model.weights import WeightSource

Parameter = Callable[[str, tuple[int, ...], bool], ir.TensorProtocol]
"""(name in the checkpoint, or of several tensors as ``packed.py`` says; shape in the graph; transposed) ->
tensor whose bytes are read when it is written."""

_BLOCK_ELEMENTS = 1 << 23
"""Numbers converted at a time: 32 MB of float32."""


def streamed_parameters(weights: WeightSource, dtype: Dtype) -> Parameter:
    """Parameters that read themselves from ``weights`` as ``dtype`` when they are written.

    Reading raises NirvanaError for a tensor of another shape than the graph's, and for a number that float16
    cannot hold.
    """

    def parameter(name: str, shape: tuple[int, ...], transposed: bool) -> ir.TensorProtocol:
        return _StreamedTensor(lambda: _blocks(weights, name, shape, dtype, transposed), dtype, shape, name)

    return parameter


def as_array(tensor: torch.Tensor) -> NDArray[np.generic]:
    """A contiguous CPU tensor as a numpy array on the same memory; bfloat16 included."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[np.generic] = tensor.numpy()
    return array


class _StreamedTensor(ir.LazyTensor):
    """A tensor that is written block by block, and whole only where someone asks for it whole."""

    def __init__(
        self,
        blocks: Callable[[], Iterator[torch.Tensor]],
        dtype: Dtype,
        shape: tuple[int, ...],
        name: str,
    ) -> None:
        super().__init__(
            lambda: ir.Tensor(as_array(torch.cat(list(blocks())).reshape(shape)), name=name),
            dtype=dtype.ir,
            shape=ir.Shape(shape),
            name=name,
        )
        self._blocks = blocks

    def tofile(self, file: IO[bytes]) -> None:
        """Write the bytes, little-endian, without ever holding them all."""
        for block in self._blocks():
            file.write(as_array(block).view(np.uint8).data)


def _blocks(
    weights: WeightSource, name: str, shape: tuple[int, ...], dtype: Dtype, transposed: bool
) -> Iterator[torch.Tensor]:
    """Leading rows of the graph's tensor, contiguous, in ``dtype``; [1, N] of a vector.

    A name of several modules (``packed.py``) is their tensors side by side.
    """
    module, _, kind = name.rpartition(".")
    names = [f"{one}.{kind}" for one in unpacked_names(module)]
    tensors = [stored.T if transposed else stored for stored in map(weights.load, names)]
    widths = [tensor.shape[-1] for tensor in tensors]
    for one, tensor in zip(names, tensors, strict=True):
        if tensor.shape[:-1] != shape[:-1] or sum(widths) != shape[-1]:
            raise NirvanaError(f"Tensor {one!r} is {tuple(tensor.shape)}, the graph asks for {shape}.")
    rows = max(1, _BLOCK_ELEMENTS // max(1, sum(widths)))
    matrices = [tensor.reshape(-1, width) for tensor, width in zip(tensors, widths, strict=True)]
    for parts in zip(*(torch.split(matrix, rows) for matrix in matrices), strict=True):
        block = torch.empty((len(parts[0]), sum(widths)), dtype=dtype.torch)
        for one, part, place in zip(names, parts, torch.split(block, widths, dim=1), strict=True):
            place.copy_(part)
            if dtype.torch == torch.float16 and torch.isinf(place).any():
                raise NirvanaError(
                    f"Tensor {one!r} holds {float(part.abs().max()):.4g}, and float16 ends at "
                    f"{torch.finfo(torch.float16).max:.0f}.",
                    hint="Export with --dtype bf16, which has the range of float32.",
                )
        yield block
