"""How far apart rounding may put two right computations of the same logits.

In float32 the tolerance is fixed, and some prompts of some models magnify rounding beyond it. So a float32
comparison that fails narrowly is made once more against the reference in float64, and may then differ by a
small multiple of what the reference's own float32 does (``benchmarks/NOTES.md``).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.export.dtypes import DTYPES, Dtype
from nirvana_deploy.quantize.schemes import scheme_named
from nirvana_deploy.verify.report import LogitsCheck

RELATIVE_TOLERANCE = 2e-4
"""Largest difference of float32 logits that counts as equal, as a share of the largest logit."""
NARROWLY = 10
"""A float32 comparison that fails by more than this many times its tolerance is wrong, not badly rounded."""
OWN_ROUNDINGS = 8
"""Largest distance from float64 that rounding explains, in distances of the reference's float32 from it."""
_ROUNDINGS_PER_LAYER = 14
"""Operators of a layer that round their result: two norms, seven linears, rotation, attention, SiLU times up,
two additions."""
_SIGMAS = 4


def relative_tolerance(dtype: Dtype, *, layers: int) -> float:
    """Largest difference of logits that rounding to ``dtype`` explains, as a share of the largest logit.

    Each of R roundings on the way through the model moves its result by at most the unit roundoff u, in a
    direction of its own, so together they move it by about u sqrt(R); four times that is allowed. For
    float32 the order of summation decides instead, which differs from runtime to runtime, and
    ``RELATIVE_TOLERANCE`` stands.
    """
    if not dtype.half_precision:
        return RELATIVE_TOLERANCE
    return _SIGMAS * dtype.unit_roundoff * math.sqrt(_ROUNDINGS_PER_LAYER * layers)


def device_tolerance(
    dtype: str, *, layers: int, quantization: str | None = None, rounds_inputs: bool = False
) -> float:
    """Largest difference of logits that another runtime's arithmetic explains, a share of the largest logit.

    As :func:`relative_tolerance`, with two differences: float32 products run in TF32 on a GPU, whose unit
    roundoff is that of float16; and where activations are quantized to 8 bits, by the graph or by a runtime
    that ``rounds_inputs``, a rounding that falls to the other side moves a value by a step of 2^-8, as
    bfloat16 does. Not yet measured on a GPU.
    """
    scheme = None if quantization is None else scheme_named(quantization)
    rounded = scheme is not None and (rounds_inputs or scheme.activation_bits is not None)
    coarse = dtype == "bf16" or rounded
    return relative_tolerance(DTYPES["bf16" if coarse else "fp16"], layers=layers)


def compare_outputs(
    name: str,
    found: NDArray[np.floating[Any]],
    expected: NDArray[np.floating[Any]],
    mask: NDArray[np.int64],
    tolerance: float,
) -> LogitsCheck:
    """Largest difference over the positions [N, T] that hold a token; NaN counts as a difference.

    ``tolerance`` is a share of the largest number expected.
    """
    real = mask.astype(bool)
    difference = float(np.abs(found - expected)[real].max())
    allowed = tolerance * float(np.abs(expected[real]).max())
    return LogitsCheck(name, difference, allowed, passed=bool(difference <= allowed))


def judge_exactly(
    name: str,
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    exact: NDArray[np.floating[Any]],
    mask: NDArray[np.int64],
    tolerance: float,
) -> LogitsCheck:
    """Compare with what is ``exact``, computed in float64: float32's own rounding may explain a difference.

    ``found`` may be ``OWN_ROUNDINGS`` times as far from it as ``expected``, the reference in float32, is.
    """
    own = compare_outputs(name, expected, exact, mask, tolerance).max_abs_diff
    check = compare_outputs(f"in float64: {name}", found, exact, mask, tolerance)
    allowed = max(check.tolerance, OWN_ROUNDINGS * own)
    return replace(check, tolerance=allowed, passed=check.max_abs_diff <= allowed)
