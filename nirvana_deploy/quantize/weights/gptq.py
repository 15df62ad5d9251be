"""Calibrated rounding of W [K, N] to V of least tr((W - V)^T H (W - V)), H = X^T X of the inputs.

Three steps, pure functions of W and H: (1) block scales of least error weighed by diag(H); (2) error
feedback, inputs of most energy first [GPTQ, arXiv 2210.17323, scales fixed beforehand]; (3) coordinate
descent, each code the best given all others [QuantEase, arXiv 2309.01885]. Damping is relative to each
input's own energy: a share of the mean would hide the weak inputs of a down_proj that makes attention sinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.quantize.weights.rounding import (
    RoundedWeight,
    block_scales,
    checked,
    nearest_codes,
    per_row,
    to_codes,
)

DAMPING = 0.05
"""Added to the diagonal of H, as a share of it: what 8192 tokens cannot know about correlations."""
SWEEPS = 2
_CHUNK_INPUTS = 128
"""Inputs between two updates of all the others, which is one large matrix product."""
_SMALLEST_ENERGY_SHARE = 1e-10


@dataclass(frozen=True)
class Inputs:
    """What rounding needs of the inputs of a linear, computed once for all weights that read them."""

    energy: NDArray[np.float32]
    """[K]: diag(H), positive."""
    H: torch.Tensor
    """[K, K], damped."""
    order: torch.Tensor
    """[K]: inputs by their energy, the largest first."""
    U: torch.Tensor
    """[K, K], upper triangular: the inverse of H in that order is U^T U."""


def inputs_of(hessian: NDArray[np.float32], *, damping: float = DAMPING) -> Inputs:
    """Prepare H = X^T X [K, K], which is damped **in place** (of a wide FFN it takes most of the memory).

    Raises NirvanaError when it is not finite, or the inputs were zero throughout.
    """
    energy = _energy(hessian)
    H = torch.from_numpy(hessian)
    H.diagonal().copy_(torch.from_numpy(energy)).mul_(1 + damping)
    order = torch.argsort(H.diagonal(), descending=True)
    return Inputs(energy=energy, H=H, order=order, U=inverse_factor(H[order[:, None], order]))


def round_calibrated(
    weight: NDArray[Any],
    inputs: Inputs,
    *,
    bits: int,
    block_size: int,
    sweeps: int = SWEEPS,
    scale_dtype: np.dtype[np.generic] | None = None,
) -> RoundedWeight:
    """Round ``weight`` [K, N] to symmetric codes for what it reads; it is not changed.

    Its output channels are independent of each other: any part of them [K, N'] gives that part of the
    codes. Raises NirvanaError when the weight is not finite.
    """
    values = checked(weight)
    scales = block_scales(
        values, bits=bits, block_size=block_size, search=True, importance=inputs.energy, dtype=scale_dtype
    )
    W = torch.from_numpy(values)
    steps = torch.from_numpy(per_row(scales.astype(np.float32), block_size, len(values)))
    codes = feedback_codes(W, inputs, steps, bits=bits)
    codes = descended_codes(W, inputs.H, steps, codes, bits=bits, sweeps=sweeps)
    return RoundedWeight(codes=codes.to(torch.int8).numpy(), scales=scales, bits=bits, block_size=block_size)


def feedback_codes(W: torch.Tensor, inputs: Inputs, steps: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Step 2: codes [K, N] (float32) of ``W`` [K, N] at ``steps`` [K, N]."""
    order, U = inputs.order, inputs.U
    rest, steps = W[order], steps[order]
    codes = torch.empty_like(rest)
    stored = np.empty(W.shape[1], dtype=np.float32)
    for chunk in _chunks(len(rest)):
        here, factor = rest[chunk], U[chunk, chunk]
        errors, own = torch.empty_like(here), factor.diagonal().tolist()
        rows = zip(*map(_rows, (here, steps[chunk], codes[chunk], errors)), own, strict=True)
        spread = zip(factor.unbind(), errors.unbind(), rows, strict=True)
        for i, (share, lost, (weight, step, code, error, pivot)) in enumerate(spread, start=1):
            nearest_codes(weight, step, bits=bits, out=code)
            np.multiply(code, step, stored)
            np.subtract(weight, stored, error)
            np.divide(error, pivot, error)
            here[i:].addr_(share[i:], lost, alpha=-1)
        rest[chunk.stop :].addmm_(U[chunk, chunk.stop :].T, errors, alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return unordered


def inverse_factor(H: torch.Tensor) -> torch.Tensor:
    """The upper triangular U with H^-1 = U^T U; computed at unit diagonal, where float32 is enough.

    ``H`` is consumed.
    """
    scale = H.diagonal().sqrt()
    H.div_(scale[:, None]).div_(scale)
    torch.cholesky_inverse(torch.linalg.cholesky(H), out=H)
    factor: torch.Tensor = torch.linalg.cholesky(H, upper=True)
    return factor.div_(scale)


def descended_codes(
    W: torch.Tensor, H: torch.Tensor, steps: torch.Tensor, codes: torch.Tensor, *, bits: int, sweeps: int
) -> torch.Tensor:
    """Step 3: ``codes`` [K, N] improved one input at a time, ``sweeps`` times over all K."""
    codes = codes.clone()
    left = W - codes * steps
    curvature = H.diagonal()[:, None] * steps
    for _ in range(sweeps):
        gradient = H @ left
        for chunk in _chunks(len(W)):
            here, within, old = gradient[chunk], H[chunk, chunk], codes[chunk]
            new, change = torch.empty_like(here), torch.empty_like(here)
            several = (here, curvature[chunk], old, steps[chunk], new, change)
            rows = zip(*map(_rows, several), strict=True)
            spread = zip(within.unbind(), change.unbind(), rows, strict=True)
            for i, (share, step_taken, row) in enumerate(spread, start=1):
                slope, curve, code, step, better, moved = row
                np.divide(slope, curve, better)
                to_codes(np.add(better, code, better), bits=bits)
                np.multiply(np.subtract(code, better, moved), step, moved)
                here[i:].addr_(share[i:], step_taken)
            old.copy_(new)
            after = left[chunk] + change
            later = slice(chunk.stop, None)
            gradient[later].addmm_(H[later, chunk], after - left[chunk])
            left[chunk] = after
    return codes


def _rows(values: torch.Tensor) -> NDArray[np.float32]:
    """The rows of a tensor, to be changed in place by numpy, which calls its loops sooner than torch."""
    rows: NDArray[np.float32] = values.numpy()
    return rows


def _energy(hessian: NDArray[np.float32]) -> NDArray[np.float32]:
    """diag(H) [K], inputs that never fired lifted to a share too small to matter."""
    if not np.isfinite(hessian).all():
        raise NirvanaError(
            "Calibration activations hold NaN or infinite values.",
            hint="The float model overflows on this text: export it as fp32, or check the weights.",
        )
    energy = np.ascontiguousarray(hessian.diagonal())
    if not energy.max(initial=0.0) > 0:
        raise NirvanaError(
            "Calibration activations are zero throughout, which says nothing about rounding.",
            hint="Check the calibration text, or round without it: --rounding search.",
        )
    lifted: NDArray[np.float32] = np.maximum(energy, _SMALLEST_ENERGY_SHARE * energy.max())
    return lifted


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, _CHUNK_INPUTS):
        yield slice(start, min(start + _CHUNK_INPUTS, count))
