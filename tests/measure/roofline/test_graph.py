"""Work counted in ONNX files against the same counts by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders.tiny import VOCABULARY, write_tiny
from builders.tiny_decoder import write_tiny_decoder

from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.bounds import Work, mean_context_tokens
from nirvana_deploy.measure.roofline.graph import INTEGER, work_of
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization

LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM, NEURONS = 3, 48, 6, 3, 16, 40
LINEARS = LAYERS * HIDDEN * (2 * HEADS * HEAD_DIM + 2 * GROUPS * HEAD_DIM + 3 * NEURONS)
HEAD = VOCABULARY * HIDDEN
CACHE_BYTES = LAYERS * 2 * GROUPS * HEAD_DIM * 4
"""Per token."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = write_tiny(tmp_path_factory.mktemp("model") / "llama", "llama-tied", head_dim=HEAD_DIM)
    return Checkpoint.open(folder)


def counted(folder: Path) -> Work:
    return work_of(folder, linear_parameters=LINEARS)


def attention(tokens: int, past: int = 0) -> int:
    """Two products of H d numbers for each pair of a query and a key that it sees."""
    pairs = sum(past + query + 1 for query in range(tokens))
    return LAYERS * 4 * HEADS * HEAD_DIM * pairs


@pytest.mark.parametrize(
    ("flavor", "cache_tokens"), [("portable", None), ("gqa", None), ("static-cache", 32)]
)
def test_a_decoder_in_float_by_hand(
    flavor: str, cache_tokens: int | None, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert checkpoint.shape.linear_parameters == LINEARS
    onnx_from_checkpoint(checkpoint, tmp_path / "onnx", flavor=flavor, cache_tokens=cache_tokens)
    work = counted(tmp_path / "onnx")
    prefill = work.prefill(prompt_tokens=10, batch_size=2)
    assert prefill.operations == {"float32": 2 * (10 * 2 * (LINEARS + HEAD) + attention(10))}
    norms = 4 * (2 * LAYERS + 1) * HIDDEN
    assert prefill.weight_bytes == pytest.approx(4 * (LINEARS + HEAD) + norms, abs=400)  # shapes, masks
    assert (prefill.cache_read_bytes, prefill.cache_written_bytes) == (0, 20 * CACHE_BYTES)
    assert prefill.logits_bytes == 20 * 4 * VOCABULARY
    step = work.decode(context_tokens=20)
    assert step.operations == {"float32": 2 * (LINEARS + HEAD) + attention(1, past=19)}
    assert (step.weight_bytes, step.cache_read_bytes) == (prefill.weight_bytes, 20 * CACHE_BYTES)
    assert step.cache_written_bytes == (20 if flavor == "portable" else 1) * CACHE_BYTES
    assert step.moved_bytes == step.read_bytes + step.cache_written_bytes + 4 * VOCABULARY
    mean = work.mean_decode(prompt_tokens=10, new_tokens=4)
    assert mean == work.decode(context_tokens=float(np.mean([11, 12, 13])), prompt_tokens=10)


@pytest.mark.parametrize("flavor", ["portable", "gqa"])
@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("w8", 8), ("w4", 4)])
def test_quantized_products_are_integer_ones(
    scheme: str, bits: int, flavor: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    onnx_from_checkpoint(checkpoint, tmp_path / "onnx", flavor=flavor)
    plain = {"smooth": "none"} if scheme == "int8" else {"rounding": "plain"}
    windows = np.random.default_rng(0).integers(3, VOCABULARY, (4, 16), dtype=np.int64)
    recipe = Quantization(scheme=scheme, head=True, **plain)
    calibration = windows if scheme == "int8" else None
    quantize_onnx(tmp_path / "onnx", tmp_path / scheme, recipe, calibration=calibration)
    work = counted(tmp_path / scheme)
    step = work.decode(context_tokens=20)
    assert step.operations[INTEGER] == 2 * (LINEARS + HEAD)
    outliers = step.operations["float32"] - attention(1, past=19)
    assert outliers == 0 or (scheme == "int8" and outliers % (2 * HIDDEN) == 0)
    least = bits / 8 * (LINEARS + HEAD)
    assert least < step.weight_bytes < 2 * least + 8_000


def test_logits_of_the_last_position_cost_one_row(checkpoint: Checkpoint, tmp_path: Path) -> None:
    onnx_from_checkpoint(checkpoint, tmp_path / "onnx", last_logits=True)
    prefill = counted(tmp_path / "onnx").prefill(prompt_tokens=10)
    assert prefill.operations == {"float32": 2 * (10 * LINEARS + HEAD) + attention(10)}
    assert prefill.logits_bytes == 4 * VOCABULARY


def test_layers_of_different_widths(tmp_path: Path) -> None:
    """The tiny decoder: D 8, d 4, one head and then two, V 11, no FFN."""
    work = work_of(write_tiny_decoder(tmp_path / "onnx"), linear_parameters=0)
    weights = [8 * 4] * 4 + [8 * 8] * 4 + [8 * 11]
    assert [one.weights for one in work.products] == weights
    assert [one.width for one in work.mixings] == [4, 8]
    pairs = 1 + 2 + 3
    assert work.prefill(prompt_tokens=3).all_operations == 3 * 2 * sum(weights) + 4 * (4 + 8) * pairs


def test_the_mean_context_is_that_of_the_steps() -> None:
    assert mean_context_tokens(prompt_tokens=10, new_tokens=4) == np.mean([11, 12, 13])
