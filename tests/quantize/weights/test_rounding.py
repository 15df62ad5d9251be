"""Rounding as pure maths: codes and scales, and codes fitted to calibration inputs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.quantize.weights.gptq import (
    descended_codes,
    feedback_codes,
    inputs_of,
    inverse_factor,
    round_calibrated,
)
from nirvana_deploy.quantize.weights.rounding import code_range, require_block_size, round_weight

K, N = 72, 20


@pytest.fixture
def weight() -> NDArray[np.float32]:
    """[K, N] with a few large values, as trained weights have."""
    rng = np.random.default_rng(0)
    return (rng.standard_t(4, size=(K, N)) * 0.05).astype(np.float32)


@pytest.fixture
def inputs() -> NDArray[np.float32]:
    """[400, K] correlated inputs, one of them a hundred times stronger than the rest."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, K)) @ rng.normal(size=(K, K)) * 0.3
    x[:, 5] *= 100
    return x.astype(np.float32)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(("bits", "block_size"), [(8, K), (4, 16), (4, 32), (4, 128)])
def test_codes_are_the_nearest_of_their_scale(
    weight: NDArray[np.float32], bits: int, block_size: int, search: bool
) -> None:
    before = weight.copy()
    rounded = round_weight(weight, bits=bits, block_size=block_size, search=search)
    np.testing.assert_array_equal(weight, before)  # not changed
    low, high = code_range(bits)
    assert rounded.codes.shape == (K, N)
    assert low <= rounded.codes.min() <= rounded.codes.max() <= high
    assert rounded.scales.shape == (-(-K // block_size), N)
    assert (rounded.scales > 0).all()
    for start, scale in zip(range(0, K, block_size), rounded.scales, strict=True):
        rows = slice(start, start + block_size)
        wanted = weight[rows] / scale
        unclipped = np.abs(wanted) < high
        assert np.abs(rounded.codes[rows] - wanted)[unclipped].max() <= 0.5 + 1e-5
        if not search:
            assert np.abs(wanted).max() <= high * (1 + 1e-6)  # the largest weight is reached, not clipped


def output_error(
    weight: NDArray[np.float32], rounded: NDArray[np.float32], hessian: NDArray[np.float32]
) -> float:
    """Squared change of the output relative to the output: tr(E^T H E) / tr(W^T H W) with E = W - V."""
    difference = weight - rounded
    return float(np.sum(difference * (hessian @ difference)) / np.sum(weight * (hessian @ weight)))


def test_channels_are_rounded_apart(weight: NDArray[np.float32]) -> None:
    whole = round_weight(weight, bits=4, block_size=32, search=True)
    parts = round_weight(weight, bits=4, block_size=32, search=True, channels_at_once=7)
    np.testing.assert_array_equal(parts.codes, whole.codes)
    np.testing.assert_array_equal(parts.scales, whole.scales)


def test_importance_moves_the_error_to_inputs_that_matter_less(weight: NDArray[np.float32]) -> None:
    energy = np.logspace(-2, 2, K).astype(np.float32)
    plain, weighed = (
        (energy @ (round_weight(weight, bits=4, block_size=24, **how).dequantized() - weight) ** 2).sum()
        for how in ({"search": True}, {"search": True, "importance": energy})
    )
    assert weighed < 0.99 * plain


def test_a_searched_scale_is_never_worse(weight: NDArray[np.float32]) -> None:
    energy = np.linspace(0.1, 5, K).astype(np.float32)
    for importance in (None, energy):
        weights = np.ones(K, dtype=np.float32) if importance is None else importance
        errors = [
            (weights @ (round_weight(weight, bits=4, block_size=24, **how).dequantized() - weight) ** 2).sum()
            for how in ({}, {"search": True, "importance": importance})
        ]
        assert errors[1] < 0.9 * errors[0]


def test_scales_are_of_the_dtype_of_the_graph(weight: NDArray[np.float32]) -> None:
    rounded = round_weight(weight, bits=4, block_size=32, scale_dtype=np.dtype(np.float16))
    assert rounded.scales.dtype == np.float16
    error = np.abs(rounded.dequantized() - weight)
    assert error.max() <= 0.501 * rounded.scales.astype(np.float32).max()  # codes know the rounded scales


def test_a_block_of_zeros_stays_zero() -> None:
    weight = np.zeros((32, 2), dtype=np.float32)
    weight[:16, 0] = np.linspace(-1, 1, 16)
    rounded = round_weight(weight, bits=4, block_size=16, search=True)
    assert (rounded.scales > 0).all()
    assert not rounded.dequantized()[:, 1].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(weight: NDArray[np.float32], bad: float) -> None:
    weight[3, 4] = bad
    with pytest.raises(NirvanaError, match=r"shape \[72, 20\] holds NaN or infinite"):
        round_weight(weight, bits=4, block_size=32)


@pytest.mark.parametrize("size", [0, 8, 48, 512])
def test_a_block_size_that_no_runtime_reads_is_refused(size: int) -> None:
    with pytest.raises(NirvanaError, match=rf"must be one of 16, 32, 64, 128, 256, got {size}"):
        require_block_size(size)
    require_block_size(64)


def test_the_factor_is_that_of_the_inverse(inputs: NDArray[np.float32]) -> None:
    H = torch.from_numpy(inputs.T @ inputs)
    H.diagonal().mul_(1.05)
    U = inverse_factor(H.clone())
    assert torch.equal(U, U.triu())
    torch.testing.assert_close((U.T @ U @ H), torch.eye(K), rtol=0, atol=2e-2)


def test_feedback_equals_its_definition(inputs: NDArray[np.float32], weight: NDArray[np.float32]) -> None:
    """Each input is rounded, then all later weights move to the least-squares optimum given the codes."""
    K = 140  # more than one chunk
    rng = np.random.default_rng(2)
    x = rng.normal(size=(600, K))
    H = x.T @ x
    W = rng.normal(size=(K, 3))
    step = 0.3
    order = np.argsort(-H.diagonal())
    expected, rest = np.empty((K, 3)), W.copy()
    for position, k in enumerate(order):
        expected[k] = np.clip(np.rint(rest[k] / step), -8, 7)
        lost = rest[k] - expected[k] * step
        later = order[position + 1 :]
        if len(later):
            rest[later] += np.linalg.solve(H[np.ix_(later, later)], H[np.ix_(later, [k])]) @ lost[None]
    codes = feedback_codes(
        torch.from_numpy(W).float(), inputs_of(H.astype("f4"), damping=0), torch.full((K, 3), step), bits=4
    )
    assert (codes.numpy() == expected).mean() > 0.99  # ties may fall either way in float32


def test_descent_ends_where_no_single_code_can_improve() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6))
    H, W, step = x.T @ x, rng.normal(size=(6, 1)), 0.4
    start = np.clip(np.rint(W / step), -8, 7)

    def error(codes: NDArray[np.float64]) -> float:
        left = W - step * codes
        return float((left * (H @ left)).sum())

    tensors = [torch.from_numpy(array).double() for array in (W, H, np.full((6, 1), step), start)]
    errors = [error(descended_codes(*tensors, bits=4, sweeps=sweeps).numpy()) for sweeps in range(6)]
    assert errors[0] == pytest.approx(error(start))
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))
    found = descended_codes(*tensors, bits=4, sweeps=20).numpy()
    for k in range(6):
        for change in (-1, 1):
            moved = found.copy()
            moved[k] = np.clip(moved[k] + change, -8, 7)
            assert error(moved) >= error(found) - 1e-9


@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (8, K)])
def test_calibrated_codes_keep_the_output(
    weight: NDArray[np.float32], inputs: NDArray[np.float32], bits: int, block_size: int
) -> None:
    seen, unseen = inputs[:300], inputs[300:]
    hessian = seen.T @ seen
    plain = round_weight(weight, bits=bits, block_size=block_size).dequantized()
    known = inputs_of(hessian.copy())
    rounded = round_calibrated(weight, known, bits=bits, block_size=block_size)
    part = round_calibrated(weight[:, 5:9], known, bits=bits, block_size=block_size)
    np.testing.assert_array_equal(part.codes, rounded.codes[:, 5:9])  # output channels are independent
    fitted = rounded.dequantized()
    heldout = unseen.T @ unseen
    for judged in (hessian, heldout):
        assert output_error(weight, fitted, judged) < 0.5 * output_error(weight, plain, judged)
    # the definition: squared change of the output, relative to the output
    wanted = ((unseen @ (weight - fitted)) ** 2).sum() / ((unseen @ weight) ** 2).sum()
    assert output_error(weight, fitted, heldout) == pytest.approx(wanted, rel=1e-3)


def test_inputs_that_never_fire_are_rounded_plainly(
    weight: NDArray[np.float32], inputs: NDArray[np.float32]
) -> None:
    inputs[:, :8] = 0
    rounded = round_calibrated(weight, inputs_of(inputs.T @ inputs), bits=4, block_size=8)
    assert np.abs(rounded.dequantized()[:8] - weight[:8]).max() <= 0.6 * np.abs(weight[:8]).max()


@pytest.mark.parametrize(("value", "words"), [(0.0, "zero throughout"), (np.nan, "NaN or infinite")])
def test_useless_calibration_is_refused(value: float, words: str) -> None:
    with pytest.raises(NirvanaError, match=words):
        inputs_of(np.full((K, K), value, dtype=np.float32))


def test_weights_whose_squares_overflow_are_rounded_all_the_same(weight: NDArray[np.float32]) -> None:
    large = weight * np.float32(2e37 / np.abs(weight).max())
    rounded = round_weight(large, bits=4, block_size=32, search=True)
    plain = round_weight(large, bits=4, block_size=32)
    np.testing.assert_array_equal(rounded.scales, plain.scales)  # no error can be compared with another
