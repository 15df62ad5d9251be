"""One layer at a time on another device: torch refuses to mix devices, even on one that has no values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.divergence import masked_quality
from nirvana_deploy.prune.plan import make_plan
from nirvana_deploy.prune.refit.reconstruct import reconstruct_layers
from nirvana_deploy.prune.streaming.loading import compute_device
from nirvana_deploy.prune.streaming.score import score_units

META = torch.device("meta")


class ZerosFromMeta(TorchFunctionMode):
    """What comes to the CPU from the meta device is zeros; nothing comes from anywhere else."""

    came = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.Tensor.cpu:
            return function(*args, **(kwargs or {}))
        assert args[0].device == META
        self.came += 1
        return torch.zeros(args[0].shape, dtype=args[0].dtype)


@pytest.mark.parametrize("kind", ["llama-biased", "qwen3", "t5"])
def test_scoring_and_comparing_never_mix_devices(
    tmp_path: Path, tokens: NDArray[np.int64], kind: str
) -> None:
    checkpoint = Checkpoint.open((write_t5 if kind == "t5" else write_tiny)(tmp_path, kind))
    shape = checkpoint.shape
    with ZerosFromMeta() as brought:
        scores = score_units(checkpoint, tokens, micro_batch=4, device=META)
        assert [len(groups) for groups in scores.groups] == [layer.kv_heads for layer in shape.layers]
        assert brought.came > 4 * len(shape.layers)
        plan = make_plan(shape, scores, sparsity=0.3, gamma=1.0, round_to=4, saliency="nirvana")
        [quality] = masked_quality(checkpoint, [plan], [tokens], device=META)
        assert quality.divergence.tolist() == [[0.0] * len(tokens)]
        reconstruct_layers(checkpoint, plan, tokens, tmp_path / "r", device=META)
        score_units(checkpoint, tokens, saliency="wanda-sp", device=META)


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert compute_device().type == device


@pytest.mark.gpu
def test_scores_on_the_gpu_are_those_on_the_cpu(tiny: Path, tokens: NDArray[np.int64]) -> None:
    checkpoint = Checkpoint.open(tiny)
    found = score_units(checkpoint, tokens, device=torch.device("cuda"))
    expected = score_units(checkpoint, tokens, device=torch.device("cpu"))
    for a, b in zip(found.groups + found.neurons, expected.groups + expected.neurons, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)
