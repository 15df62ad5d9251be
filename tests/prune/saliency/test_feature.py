"""Forward-only saliencies: statistics equal hooks on the whole model, formulas equal paper and pencil."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import tiny_t5
from builders.tiny import write_tiny
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_checkpoint
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.reading import teacher_forced
from nirvana_deploy.prune.saliency.feature import flap, merged, statistics_of, wanda_sp
from nirvana_deploy.prune.saliency.gradient import SALIENCIES, strongest_tokens
from nirvana_deploy.prune.streaming.score import score_units

INPUTS = torch.tensor([[1.0, 0.0, 2.0, 3.0], [3.0, 4.0, 2.0, -3.0]])  # two positions of four inputs
WEIGHT = torch.tensor([[1.0, -2.0, 0.5, 1.0], [-1.0, 0.0, 0.5, 2.0]])  # [D=2, C=4]


def test_wanda_sp_by_hand() -> None:
    # column sums of |W|: 2 2 1 3; norms of X: sqrt10, 4, sqrt8, sqrt18; two units of two columns
    scores = wanda_sp(WEIGHT, statistics_of(INPUTS), 2, True)
    expected = [2 * 10**0.5 + 2 * 4, 1 * 8**0.5 + 3 * 18**0.5]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("attention", [True, False])
def test_flap_by_hand(attention: bool) -> None:
    # variances of X (ddof 1): 2, 8, 0, 18; squared column norms of W: 2, 4, 0.5, 5
    fluctuation = np.array([4.0, 32.0, 0.0, 90.0])
    columns = fluctuation**2 if attention else fluctuation
    standardised = (columns - columns.mean()) / columns.std(ddof=1)
    scores = flap(WEIGHT, statistics_of(INPUTS), 2, attention)
    np.testing.assert_allclose(scores.numpy(), standardised.reshape(2, 2).mean(1), rtol=1e-12)
    assert scores.sum() == pytest.approx(0, abs=1e-12)


def test_flap_of_inputs_that_never_change_is_zero() -> None:
    scores = flap(WEIGHT, statistics_of(torch.ones(5, 4)), 4, False)
    assert scores.tolist() == [0, 0, 0, 0]


def test_merged_statistics_are_those_of_all_positions() -> None:
    inputs = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)) + 10
    both = merged(statistics_of(inputs[:2]), statistics_of(inputs[2:]))
    flat = inputs.reshape(-1, 3).double()
    torch.testing.assert_close(both.variance, flat.var(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(both.norm, flat.norm(dim=0), rtol=1e-12, atol=0)


def test_strongest_tokens_by_hand() -> None:
    logits = torch.tensor([[[1.0, 5.0], [3.0, 2.0]], [[0.0, 0.0], [-1.0, 4.0]]])  # [N=2, T=2, V=2]
    assert strongest_tokens(logits, torch.zeros(2, 2)).item() == (5 + 3) / 2 + (0 + 4) / 2


@pytest.mark.parametrize("saliency", ["wanda-sp", "flap"])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_streamed_statistics_equal_hooks_on_the_whole_model(
    tiny: Path, tokens: NDArray[np.int64], saliency: str, micro_batch: int
) -> None:
    model, shape = load_checkpoint(tiny), shape_from_config(config_json(tiny))
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    scores = score_units(Checkpoint.open(tiny), tokens, saliency=saliency, micro_batch=micro_batch)
    method = SALIENCIES[saliency].features
    assert method is not None
    for index, layer in enumerate(model.model.layers):
        prefix, widths = f"model.layers.{index}", shape.layers[index]
        attention = statistics_of(inputs[f"{prefix}.self_attn.o_proj"])
        groups = method(layer.self_attn.o_proj.weight.detach(), attention, widths.kv_heads, True)
        np.testing.assert_allclose(scores.groups[index], groups, rtol=1e-4)
        ffn = statistics_of(inputs[f"{prefix}.mlp.down_proj"])
        neurons = method(layer.mlp.down_proj.weight.detach(), ffn, widths.ffn_width, False)
        np.testing.assert_allclose(scores.neurons[index], neurons, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("saliency", ["wanda-sp", "flap"])
@pytest.mark.parametrize("kind", list(tiny_t5.KINDS))
def test_both_stacks_of_an_encoder_decoder_are_scored_by_their_inputs(
    tmp_path: Path, tokens: NDArray[np.int64], saliency: str, kind: str
) -> None:
    folder = tiny_t5.write_t5(tmp_path, kind)
    checkpoint, inputs = Checkpoint.open(folder), dict[str, torch.Tensor]()
    model, shape, method = checkpoint.load(), checkpoint.shape, SALIENCIES[saliency].features
    assert method is not None
    for name, module in model.named_modules():
        if name.endswith((".o", ".wo")):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    read, written = map(torch.from_numpy, teacher_forced(tokens, start_token=0))
    with torch.no_grad():
        model(input_ids=read, decoder_input_ids=written)
    scores = score_units(checkpoint, tokens, saliency=saliency, micro_batch=4)
    for layer, units in enumerate(shape.layers):
        site, prefix = shape.place(layer)

        def expected(name: str, count: int, attention: bool, prefix: str = prefix) -> NDArray[np.float64]:
            weight = checkpoint.weights.load(f"{prefix}.{name}.weight")
            return method(weight, statistics_of(inputs[f"{prefix}.{name}"]), count, attention).numpy()  # type: ignore[no-any-return]

        np.testing.assert_allclose(scores.groups[layer], expected(site.o, units.kv_heads, True), rtol=1e-4)
        if units.site == "cross":
            assert len(scores.neurons[layer]) == 0
            continue
        neurons = expected(site.ffn_down, units.ffn_width, False)
        np.testing.assert_allclose(scores.neurons[layer], neurons, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("saliency", ["wanda-sp", "flap"])
def test_without_data_they_are_refused(tiny_llama: Path, saliency: str) -> None:
    with pytest.raises(NirvanaError, match="needs calibration text"):
        score_units(Checkpoint.open(tiny_llama), None, saliency=saliency)


def test_infinite_activations_name_the_layer(tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    folder = write_tiny(tmp_path, "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3e38
    tensors["model.layers.1.mlp.up_proj.weight"].clamp_(-3e38, 3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NirvanaError, match="Layer 1"):
        score_units(Checkpoint.open(folder), tokens, saliency="flap")
