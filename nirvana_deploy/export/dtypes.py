"""The floating-point types of an exported graph: weights, activations, KV cache and logits.

In a half-precision graph, two things stay float32 in every runtime: the mean of squares of a norm
(``stash_type``; squares of ordinary activations leave float16's range), and rotary angles with their cosine
and sine, which are rounded once. The softmax is inside one operator, so its precision is the runtime's.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from nirvana_deploy.base.errors import NirvanaError


@dataclass(frozen=True)
class Dtype:
    """One floating-point type in the words of each library."""

    name: str
    ir: ir.DataType
    torch: torch.dtype

    @property
    def element_bytes(self) -> int:
        """Bytes of one number."""
        return self.torch.itemsize

    @property
    def half_precision(self) -> bool:
        """Whether it is narrower than float32."""
        return self.element_bytes < 4

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding a number to this type: half of the machine epsilon."""
        return float(torch.finfo(self.torch).eps) / 2


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("fp32", ir.DataType.FLOAT, torch.float32),
        Dtype("fp16", ir.DataType.FLOAT16, torch.float16),
        Dtype("bf16", ir.DataType.BFLOAT16, torch.bfloat16),
    )
}


def dtype_named(name: str) -> Dtype:
    """The type called ``name``; raises NirvanaError for another name."""
    if name not in DTYPES:
        raise NirvanaError(f"Unknown dtype {name!r}; there are {', '.join(DTYPES)}.")
    return DTYPES[name]
