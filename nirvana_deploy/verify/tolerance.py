"""Logits of an ONNX decoder beside those of its checkpoint, and how far apart rounding may put them.

In float32 the tolerance is fixed, and some prompts of some models magnify rounding beyond it: a cut SmolLM2
has a token on the border of the massive activation of its layer 11, and there two right float32 programs
differ twice as much as is allowed. So a comparison that fails narrowly is made once more against the
checkpoint in float64, and may then differ by a small multiple of what torch's own float32 does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from nirvana_deploy.export.dtypes import Dtype
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder

RELATIVE_TOLERANCE = 2e-4
"""Largest difference of float32 logits that counts as equal, as a share of the largest logit."""
_ROUNDINGS_PER_LAYER = 14
"""Operators of a layer that round their result: two norms, seven linears, rotation, attention, SiLU times up,
two additions."""
_SIGMAS = 4
_NARROWLY = 10
"""A float32 comparison that fails by more than this many times its tolerance is wrong, not badly rounded."""
OWN_ROUNDINGS = 8
"""Largest distance from float64 that rounding explains, in distances of torch's float32 from it. Both are
draws of the same error; measured on SmolLM2, cut and dense, ONNX Runtime's is 0.4 to 5.6 times torch's."""


@dataclass(frozen=True)
class LogitsCheck:
    """One comparison of logits."""

    name: str
    max_abs_diff: float
    tolerance: float
    passed: bool


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


def logits_checks(
    model: PreTrainedModel, decoder: OrtDecoder, relative_tolerance: float
) -> Iterator[LogitsCheck]:
    """Prefill at odd lengths, a left-padded batch, and decoding with a past (padded and not).

    Yields comparisons of ``decoder`` with ``model``, whose difference may be ``relative_tolerance`` of the
    largest logit; of a graph with last logits only the last position is compared. A model in float32 is
    computed in float64 too where a comparison fails narrowly.
    """
    generator = np.random.default_rng(11)

    def draw(sequences: int, length: int) -> NDArray[np.int64]:
        return generator.integers(0, decoder.vocab_size, size=(sequences, length))

    def compare(
        name: str, found: NDArray[np.float32], tokens: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> LogitsCheck:
        last = slice(-1, None) if decoder.last_logits else slice(None)
        expected = torch_logits(model, tokens, mask)[:, last]

        def exact() -> NDArray[np.float32]:
            with in_float64(model):
                return torch_logits(model, tokens, mask)[:, last]

        return judged(name, found[:, last], expected, exact, mask[:, last], relative_tolerance)

    for sequences, length in ((1, 1), (1, 7), (2, 45)):
        tokens = draw(sequences, length)
        logits, _ = decoder.prefill(tokens)
        yield compare(f"prefill {sequences} x {length}", logits, tokens, np.ones_like(tokens))

    padding = np.ones((3, 19), dtype=np.int64)
    padding[0, :11], padding[1, :4] = 0, 0
    left_padded = [] if decoder.last_logits and decoder.in_place else [(", left-padded", padding)]
    for name, mask in [("", padding[2:]), *left_padded]:
        prompt_tokens = 13
        tokens = draw(len(mask), mask.shape[1])
        logits, state = decoder.prefill(tokens[:, :prompt_tokens], mask[:, :prompt_tokens])
        parts = [logits]
        for position in range(prompt_tokens, tokens.shape[1]):
            logits, state = decoder.decode(tokens[:, position : position + 1], state)
            parts.append(logits)
        steps = tokens.shape[1] - prompt_tokens
        found = np.concatenate(parts, axis=1)
        yield compare(
            f"prefill {len(mask)} x {prompt_tokens}{name}, then {steps} decode steps", found, tokens, mask
        )


def judged(
    name: str,
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    exact: Callable[[], NDArray[np.float32]],
    mask: NDArray[np.int64] | None,
    relative_tolerance: float,
) -> LogitsCheck:
    """:func:`compare_outputs`, and where that fails narrowly in float32, once more with what is ``exact``.

    ``exact`` computes ``expected`` in float64; ``found`` may be ``OWN_ROUNDINGS`` times as far from it as
    ``expected`` is.
    """
    check = compare_outputs(name, found, expected, mask, relative_tolerance)
    narrowly = not check.passed and check.max_abs_diff <= _NARROWLY * check.tolerance
    if not narrowly or relative_tolerance != RELATIVE_TOLERANCE:
        return check
    reference = exact()
    own = compare_outputs(name, expected, reference, mask, relative_tolerance).max_abs_diff
    again = compare_outputs(name, found, reference, mask, relative_tolerance)
    allowed = max(again.tolerance, OWN_ROUNDINGS * own)
    return replace(again, name=f"in float64: {name}", tolerance=allowed, passed=again.max_abs_diff <= allowed)


def compare_outputs(
    name: str,
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    mask: NDArray[np.int64] | None,
    relative_tolerance: float,
) -> LogitsCheck:
    """Largest difference over the positions [N, T] that hold a token; NaN counts as a difference."""
    real = slice(None) if mask is None else mask.astype(bool)
    difference = float(np.abs(found - expected)[real].max())
    tolerance = relative_tolerance * float(np.abs(expected[real]).max())
    return LogitsCheck(
        name=name, max_abs_diff=difference, tolerance=tolerance, passed=bool(difference <= tolerance)
    )


def torch_logits(
    model: PreTrainedModel, tokens: NDArray[np.int64], mask: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Logits [N, T, V] of transformers, without a cache."""
    attended = np.ones_like(tokens) if mask is None else mask
    positions = np.maximum(np.cumsum(attended, axis=1) - 1, 0)
    with torch.no_grad():
        output = model(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(attended),
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        )
    logits: NDArray[np.float32] = output.logits.numpy()
    return logits


@contextmanager
def in_float64(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block ``model``, a float32 model, computes in float64; afterwards it is as it was, bit for
    bit."""
    model.double()
    try:
        yield
    finally:
        model.float()
