"""The dense model runs once for scores and refit, to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from builders.plans import plan_for
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from numpy.typing import NDArray

from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.refit import dense_states, reconstruct
from nirvana_deploy.prune.refit.dense_states import DenseStates
from nirvana_deploy.prune.refit.reconstruct import reconstruct_layers
from nirvana_deploy.prune.streaming.score import score_for_refit, score_units


@pytest.fixture
def tokens() -> NDArray[np.int64]:
    return np.random.default_rng(4).integers(3, 272, size=(10, 24))


def written(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refuse(*_: object) -> NoReturn:
    raise AssertionError("the dense model ran again")


@pytest.mark.parametrize("kind", ["llama-tied", "olmo2", "gemma3"])
def test_a_refit_behind_scores_runs_the_dense_model_no_more(
    kind: str, tmp_path: Path, tokens: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(tmp_path / "tiny", kind)
    checkpoint, plan, seen = Checkpoint.open(folder), plan_for(folder, seed=0), DenseStates()
    scores = score_for_refit(checkpoint, tokens, seen, saliency="wanda-sp")
    alone = score_units(checkpoint, tokens, saliency="wanda-sp")
    for found, expected in zip(scores.groups + scores.neurons, alone.groups + alone.neurons, strict=True):
        np.testing.assert_array_equal(found, expected)
    reconstruct_layers(checkpoint, plan, tokens, tmp_path / "alone")
    monkeypatch.setattr(reconstruct, "aims_noted", refuse)
    reconstruct_layers(checkpoint, plan, tokens, tmp_path / "behind", seen=seen)
    assert written(tmp_path / "behind") == written(tmp_path / "alone")


def test_states_of_other_windows_batches_or_models_are_not_taken(
    tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    checkpoint, seen, windows = Checkpoint.open(tiny_llama), DenseStates(), torch.from_numpy(tokens)
    assert not seen.of(checkpoint, windows, 8)
    score_for_refit(checkpoint, tokens, seen, saliency="flap", micro_batch=8)
    assert seen.of(checkpoint, windows, 8) and seen.of(checkpoint, windows.clone(), 8)
    assert not seen.of(checkpoint, windows, 4) and not seen.of(checkpoint, windows[:8], 8)
    other = Checkpoint.open(write_tiny(tmp_path / "other", "llama-tied"))
    assert not seen.of(other, windows, 8)


def test_an_encoder_decoder_is_run_again(tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    folder = write_t5(tmp_path / "t5", "t5")
    checkpoint, seen = Checkpoint.open(folder), DenseStates()
    score_for_refit(checkpoint, tokens, seen, saliency="wanda-sp")
    reconstruct_layers(checkpoint, plan_for(folder, seed=0), tokens, tmp_path / "r", seen=seen)
    assert written(tmp_path / "r")


@pytest.mark.parametrize("limit", [("_MOST_BYTES", 0), ("_MOST_SHARE", 1 << 60)])
def test_states_that_do_not_fit_are_computed_again(
    limit: tuple[str, Any], tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dense_states, *limit)
    checkpoint, seen = Checkpoint.open(tiny_llama), DenseStates()
    score_for_refit(checkpoint, tokens, seen, saliency="wanda-sp")
    assert not seen.of(checkpoint, torch.from_numpy(tokens), 8)
    reconstruct_layers(checkpoint, plan_for(tiny_llama, seed=0), tokens, tmp_path / "r", seen=seen)
    assert written(tmp_path / "r")
