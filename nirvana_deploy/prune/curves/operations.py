"""What curves and refit cost, known before they start: arithmetic operations, from the shape alone."""

from __future__ import annotations

import time

import torch

from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.curves.measure_curves import CURVE_TOKENS, MEASURED_TOKENS, tried_groups

_PASSES_OF_CURVES = 3
"""Forward, forward again on the way back, gradients of activations."""
_PASSES_OF_REFIT = 2.5
"""The dense model, and the one being made, of which gates and values are computed once more."""


_FLOAT64_TAKES = 2
"""Times as long as the same operation in float32."""


def curve_operations(shape: ModelShape, tokens: int) -> float:
    """Floating-point operations of measuring curves on at most ``tokens`` calibration tokens."""
    used = min(tokens, CURVE_TOKENS)
    head = shape.vocab_size * shape.hidden_size
    per_token = _PASSES_OF_CURVES * shape.linear_parameters + 3 * head + _gram_products(shape)
    trials = sum(len(tried_groups(layer.kv_heads)) + (layer.ffn_width > 0) for layer in shape.layers)
    passes = 2 * (used * per_token + MEASURED_TOKENS * trials * (shape.linear_parameters / 2 + head))
    return passes + _float64_products(shape)


def refit_operations(shape: ModelShape, tokens: int) -> float:
    """Floating-point operations of choosing and refitting on ``tokens`` calibration tokens."""
    passes = 2 * tokens * (_PASSES_OF_REFIT * shape.linear_parameters + _gram_products(shape))
    return passes + _float64_products(shape)


def operations_per_second(seconds: float = 0.3) -> float:
    """What float32 products of this machine reach, measured for a moment."""
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    a @ b
    start, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        a @ b
        done += 1
    return 2 * 1024**3 * done / passed


def _float64_products(shape: ModelShape) -> float:
    """Operations of inverse and elimination of every o and down, with k inputs: 1.8 k^3 + 2 D k^2 or so."""
    found = sum(1.8 * width**3 + 2 * shape.hidden_size * width**2 for width in _widths(shape))
    return _FLOAT64_TAKES * found


def _widths(shape: ModelShape) -> list[int]:
    """Inputs of every o and down."""
    heads = [shape.head_dim * layer.query_heads for layer in shape.layers]
    return [*heads, *(layer.ffn_width for layer in shape.layers)]


def _gram_products(shape: ModelShape) -> int:
    """Multiplications a token for the Gram and cross matrices of every o and down."""
    return sum(width * (width + shape.hidden_size) for width in _widths(shape))
