"""What curves and refit cost, known before."""

from __future__ import annotations

from pathlib import Path

import pytest

from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.curves.measure_curves import CURVE_TOKENS
from nirvana_deploy.prune.curves.operations import curve_operations, operations_per_second, refit_operations

pytestmark = pytest.mark.unit


def test_a_refit_is_two_and_a_half_passes_and_a_gram_matrix_of_every_reader(tiny_llama: Path) -> None:
    shape = Checkpoint.open(tiny_llama).shape
    grams = sum(
        width * (width + shape.hidden_size)
        for layer in shape.layers
        for width in (layer.query_heads * shape.head_dim, layer.ffn_width)
    )
    more = refit_operations(shape, 200) - refit_operations(shape, 100)  # what is solved depends on no text
    assert more == pytest.approx(200 * (2.5 * shape.linear_parameters + grams))


def test_curves_read_no_more_than_their_tokens(tiny_llama: Path) -> None:
    shape = Checkpoint.open(tiny_llama).shape
    assert curve_operations(shape, 64) < curve_operations(shape, CURVE_TOKENS)
    assert curve_operations(shape, CURVE_TOKENS) == curve_operations(shape, 10 * CURVE_TOKENS)


def test_the_speed_of_this_machine_is_a_speed() -> None:
    assert operations_per_second(0.01) > 1e6
