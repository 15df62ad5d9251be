"""One layer at a time on another device: torch refuses to mix devices, even on one that has no values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from numpy.typing import NDArray

from nirvana_deploy.model.checkpoint import config_json
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.prune import divergence, least_squares, reconstruct
from nirvana_deploy.prune.divergence import masked_divergences
from nirvana_deploy.prune.plan import make_plan
from nirvana_deploy.prune.saliency import units
from nirvana_deploy.prune.streaming import encoder_decoder as score_seq2seq
from nirvana_deploy.prune.streaming import model as score
from nirvana_deploy.prune.streaming.loading import compute_device
from nirvana_deploy.prune.streaming.model import score_units, score_windows

META = torch.device("meta")


@pytest.fixture
def came_home(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Layers run on the meta device; the shapes that were brought back from it, as zeros."""
    shapes: list[torch.Size] = []

    def zeros(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.device == META
        shapes.append(tensor.shape)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(score, "compute_device", lambda: META)
    for module in (score, score_seq2seq, units, divergence, reconstruct, least_squares):
        monkeypatch.setattr(module, "home", zeros)
    return shapes


@pytest.mark.parametrize("kind", ["llama-biased", "qwen3", "t5"])
def test_scoring_and_comparing_never_mix_devices(
    tmp_path: Path, tokens: NDArray[np.int64], kind: str, came_home: list[torch.Size]
) -> None:
    folder = (write_t5 if kind == "t5" else write_tiny)(tmp_path, kind)
    shape = shape_from_config(config_json(folder))
    scores = score_units(folder, tokens, micro_batch=4)
    assert [len(groups) for groups in scores.groups] == [layer.kv_heads for layer in shape.layers]
    assert len(came_home) > 4 * len(shape.layers)
    plan = make_plan(shape, scores, sparsity=0.3, gamma=1.0, round_to=4, saliency="nirvana")
    assert masked_divergences(folder, [plan], tokens).tolist() == [[0.0] * len(tokens)]
    reconstruct.reconstruct_layers(folder, plan, tokens, tmp_path / "r")
    if kind != "t5":
        score_windows(folder, tokens)
        score_units(folder, tokens, saliency="wanda-sp")


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert compute_device().type == device


@pytest.mark.gpu
def test_scores_on_the_gpu_are_those_on_the_cpu(
    tiny: Path, tokens: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = score_units(tiny, tokens)
    monkeypatch.setattr(score, "compute_device", lambda: torch.device("cpu"))
    expected = score_units(tiny, tokens)
    for a, b in zip(found.groups + found.neurons, expected.groups + expected.neurons, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)
