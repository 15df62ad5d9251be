"""Any config is refused in a sentence, or pruned and exported to what transformers computes from it."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.odd import CLOSE, far, onnx_logits, torch_logits
from builders.odd_configs import SEED, write_odd_model
from builders.plans import plan_for
from builders.tiny import VOCABULARY
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import PrunePlan

COUNT, COUNT_IN_CI = 300, 10
LEAST_EQUAL = 0.5
"""A tool that refuses everything would pass, too."""
IDS = np.random.default_rng(SEED).integers(3, VOCABULARY, (1, 24))


def masked_logits(folder: Path, plan: PrunePlan, head_dim: int) -> NDArray[np.float32]:
    """What transformers computes from the dense model once what the plan removes counts for nothing."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        for layer, cut in zip(model.model.layers, plan.layers, strict=True):
            gone = sorted(set(range(cut.of_groups)) - set(cut.kept_groups))
            columns = layer.self_attn.o_proj.weight.view(layer.hidden_size, cut.of_groups, -1)
            columns[:, gone] = 0.0
            assert columns.shape[2] % head_dim == 0
            neurons = sorted(set(range(cut.of_neurons)) - set(cut.kept_neurons))
            layer.mlp.down_proj.weight[:, neurons] = 0.0
        logits: NDArray[np.float32] = model(torch.from_numpy(IDS)).logits.numpy()
    return logits


def outcome(folder: Path, number: int) -> str:
    """Refused, equal, or equal through the cut as well; fails where it is none of them."""
    odd = write_odd_model(folder / "model", number)
    say = f"number {number}: {odd.made}"
    try:
        checkpoint = Checkpoint.open(odd.folder)
    except NirvanaError as error:
        assert len(str(error)) < 2000, say
        return "refused"
    theirs = torch_logits(odd.folder, IDS)
    assert far(onnx_logits(odd.folder, folder / "onnx", IDS), theirs) < CLOSE, say
    try:
        plan = plan_for(odd.folder, sparsity=0.3)
    except NirvanaError:
        return "equal"  # too small to cut
    slice_checkpoint(checkpoint, plan, folder / "pruned")
    expected = masked_logits(odd.folder, plan, checkpoint.shape.head_dim)
    assert far(onnx_logits(folder / "pruned", folder / "pruned-onnx", IDS), expected) < CLOSE, say
    assert far(torch_logits(folder / "pruned", IDS), expected) < CLOSE, say
    return "equal through the cut"


def outcomes(folder: Path, count: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for number in range(count):
        found[outcome(folder, number)] += 1
        shutil.rmtree(folder)
    return found


@pytest.mark.integration
def test_an_odd_config_is_refused_or_computed_as_transformers_does(tmp_path: Path) -> None:
    found = outcomes(tmp_path / "odd", COUNT_IN_CI)
    assert 1 - found["refused"] / COUNT_IN_CI >= LEAST_EQUAL


@pytest.mark.slow
def test_three_hundred_odd_configs(tmp_path: Path) -> None:
    found = outcomes(tmp_path / "odd", COUNT)
    assert 1 - found["refused"] / COUNT >= LEAST_EQUAL
