"""Weights that are rounded while they are trained: the quantizer's numbers, also in what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders.recovering import Cut, kl_of
from safetensors.torch import load_file
from torch import nn

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.quantize.weights.gptq import inputs_of, round_calibrated
from nirvana_deploy.quantize.weights.rounding import round_weight
from nirvana_deploy.recover.before import require_recovery
from nirvana_deploy.recover.learning.rounded import round_rows, round_while_training
from nirvana_deploy.recover.recipe import Recovery


@pytest.mark.parametrize(("bits", "inputs"), [(4, 64), (4, 70), (4, 20), (8, 70)])
def test_rounding_is_the_quantizers(bits: int, inputs: int) -> None:
    weight = torch.randn(24, inputs, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0
    block_size = inputs if bits == 8 else 32
    there = round_weight(weight.T.numpy(), bits=bits, block_size=block_size).dequantized().T
    here = round_rows(weight, bits=bits, block_size=block_size)
    np.testing.assert_allclose(here.numpy(), there, rtol=1e-6, atol=0)


def test_the_gradient_goes_straight_through() -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 4))
    round_while_training(model, "w4")
    weight = model[0].parametrizations.weight.original
    model[0].weight.sum().backward()
    torch.testing.assert_close(weight.grad, torch.ones_like(weight))
    assert not hasattr(model[1], "parametrizations")  # too small for the quantizer


@pytest.mark.parametrize("scheme", ["w4", "w8"])
@pytest.mark.parametrize("kind", ["llama-tied", "phi3", "t5"])
def test_what_is_written_is_what_was_trained_and_stays_when_it_is_rounded(
    tmp_path: Path, text: Path, kind: str, scheme: str
) -> None:
    cut = Cut(tmp_path, kind, text)
    done = cut.recover(recover_for=scheme, learning_rate=4e-4)
    assert done.course.kept_step > 0
    slice_checkpoint(cut.dense, cut.plan, tmp_path / "after", recovery=tmp_path / "recovery")
    kl = kl_of(Checkpoint.open(tmp_path / "after"), cut.dense, done.text.watch)
    assert kl == pytest.approx(min(point.kl for point in done.course.curve), rel=1e-3)
    written = load_file(tmp_path / "recovery/model.safetensors")
    linears = [one for name, one in written.items() if one.ndim == 2 and min(one.shape) >= 16]
    assert len(linears) >= 4
    for weight in linears:
        bits, block_size = (4, 32) if scheme == "w4" else (8, weight.shape[1])
        for search in (False, True):
            again = round_weight(weight.float().T.numpy(), bits=bits, block_size=block_size, search=search)
            error = np.abs(again.dequantized().T - weight.float().numpy()).max()
            assert error <= 4e-3 * float(weight.abs().max())
        read = np.random.default_rng(bits).standard_normal((512, weight.shape[1]), dtype=np.float32)
        fitted = round_calibrated(
            weight.float().T.numpy(), inputs_of(read.T @ read), bits=bits, block_size=block_size
        )
        error = np.abs(fitted.dequantized().T - weight.float().numpy()).max()
        assert error <= 4e-3 * float(weight.abs().max())  # nothing is left to make up for


def test_adapters_are_not_rounded(tiny_llama: Path) -> None:
    """Said before anything is cut."""
    recipe = Recovery(recover="1k", recover_text="pydoc", recover_method="lora", recover_for="w4")
    with pytest.raises(NirvanaError, match=r"trains whole weights.*\n.*--recover-method distill"):
        require_recovery(recipe, Checkpoint.open(tiny_llama), seq_len=24)


def test_a_model_of_narrow_linears_has_nothing_to_round() -> None:
    with pytest.raises(NirvanaError, match="No linear is large enough for w8"):
        round_while_training(nn.Linear(4, 4), "w8")
