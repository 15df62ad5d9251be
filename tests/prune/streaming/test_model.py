"""The arrow weights -> scores: streamed equals one full backward, and a toy equals paper and pencil."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders.tiny import write_tiny
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_checkpoint
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.weights import SafetensorsWeights
from nirvana_deploy.prune.plan import make_plan
from nirvana_deploy.prune.plan_file import write_plan
from nirvana_deploy.prune.saliency.gradient import SALIENCIES, next_token_loss, strongest_logits
from nirvana_deploy.prune.saliency.units import UnitScores, scored_tensors, unit_sums
from nirvana_deploy.prune.streaming.head import embedded, head_blocks, states_gradient
from nirvana_deploy.prune.streaming.model import StreamedModel
from nirvana_deploy.prune.streaming.score import score_units

GRADIENT_SALIENCIES = [name for name, method in SALIENCIES.items() if method.functional]


def full_backward_scores(folder: Path, tokens: NDArray[np.int64], saliency: str) -> UnitScores:
    """The oracle: one backward through transformers' model, and sums written out by hand."""
    model, shape = load_checkpoint(folder), shape_from_config(config_json(folder))
    batch = torch.from_numpy(tokens)
    functional = SALIENCIES[saliency].functional
    assert functional is not None
    (functional(model(batch).logits, batch) / len(batch)).backward()
    d, g = shape.head_dim, shape.query_heads_per_group
    groups, neurons = [], []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp

        def score(parameter: torch.nn.Parameter) -> torch.Tensor:
            assert parameter.grad is not None
            return (parameter * parameter.grad).abs().detach().double()

        layer_groups = []
        for k in range(attention.k_proj.out_features // d):
            keys, queries = slice(k * d, (k + 1) * d), slice(k * g * d, (k + 1) * g * d)
            total = score(attention.k_proj.weight)[keys].sum() + score(attention.v_proj.weight)[keys].sum()
            total += score(attention.q_proj.weight)[queries].sum()
            total += score(attention.o_proj.weight)[:, queries].sum()
            if attention.k_proj.bias is not None:
                total += score(attention.k_proj.bias)[keys].sum() + score(attention.v_proj.bias)[keys].sum()
                total += score(attention.q_proj.bias)[queries].sum()
            layer_groups.append(float(total))
        rows = sum(score(m.weight).sum(1) for m in (mlp.gate_proj, mlp.up_proj))
        if mlp.up_proj.bias is not None:
            rows = rows + score(mlp.gate_proj.bias) + score(mlp.up_proj.bias)
        groups.append(np.array(layer_groups))
        neurons.append((rows + score(mlp.down_proj.weight).sum(0)).numpy())
    return UnitScores(groups=tuple(groups), neurons=tuple(neurons))


def assert_equal(found: UnitScores, expected: UnitScores, rtol: float = 1e-5) -> None:
    for a, b in zip(found.groups + found.neurons, expected.groups + expected.neurons, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol)


@pytest.mark.parametrize("saliency", GRADIENT_SALIENCIES)
def test_streamed_scores_equal_full_backward(tiny: Path, tokens: NDArray[np.int64], saliency: str) -> None:
    assert_equal(
        score_units(Checkpoint.open(tiny), tokens, saliency=saliency, micro_batch=2),
        full_backward_scores(tiny, tokens, saliency),
    )


@pytest.mark.parametrize("micro_batch", [1, 4, 6, 100])
def test_micro_batches_do_not_change_scores(
    tiny_llama: Path, tokens: NDArray[np.int64], micro_batch: int
) -> None:
    assert_equal(
        score_units(Checkpoint.open(tiny_llama), tokens, micro_batch=micro_batch),
        score_units(Checkpoint.open(tiny_llama), tokens, micro_batch=3),
    )


def test_streamed_logits_equal_transformers(tiny: Path, tokens: NDArray[np.int64]) -> None:
    streamed = StreamedModel(Checkpoint.open(tiny)).logits(torch.from_numpy(tokens))
    with torch.no_grad():
        expected = load_checkpoint(tiny)(torch.from_numpy(tokens)).logits
    torch.testing.assert_close(streamed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_checkpoints_of_half_precision_score_in_float32(
    tmp_path: Path, tokens: NDArray[np.int64], dtype: torch.dtype
) -> None:
    folder = write_tiny(tmp_path, "mistral", dtype=dtype, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert SafetensorsWeights(folder).dtype("model.norm.weight") == dtype
    assert_equal(
        score_units(Checkpoint.open(folder), tokens), full_backward_scores(folder, tokens, "nirvana")
    )


@pytest.mark.integration
@pytest.mark.parametrize("saliency", ["nirvana", "taylor", "wanda-sp", "flap"])
def test_another_number_of_threads_gives_the_same_plan(tmp_path: Path, saliency: str) -> None:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=384,
        num_hidden_layers=2,
        vocab_size=272,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokens, shape = (
        np.random.default_rng(0).integers(3, 272, size=(8, 96)),
        shape_from_config(config.to_dict()),
    )
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            scores = score_units(Checkpoint.open(tmp_path), tokens, saliency=saliency)
            write_plan(
                make_plan(shape, scores, sparsity=0.4, saliency=saliency), tmp_path / f"{threads}.json"
            )
    finally:
        torch.set_num_threads(before)
    plans = {(tmp_path / f"{threads}.json").read_bytes() for threads in (1, 2, 5)}
    assert len(plans) == 1


@pytest.mark.parametrize("saliency", GRADIENT_SALIENCIES)
@pytest.mark.parametrize("block_rows", [1, 7, 29, 100])
def test_gradients_by_blocks_of_the_vocabulary_are_those_of_the_functional(
    saliency: str, block_rows: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    head = torch.randn(29, 8, generator=generator)
    states = torch.randn(3, 6, 8, generator=generator).requires_grad_()
    tokens = torch.randint(0, 29, (3, 6), generator=generator)
    method = SALIENCIES[saliency]
    assert method.functional is not None and method.output_gradient is not None
    (expected,) = torch.autograd.grad(method.functional(states @ head.T, tokens), states)
    found = method.output_gradient(states.detach(), tokens, lambda: iter(head.split(block_rows)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("saliency", GRADIENT_SALIENCIES)
@pytest.mark.parametrize("kind", ["llama-tied", "mistral"])
def test_gradients_do_not_depend_on_the_blocks_of_the_head(
    tmp_path: Path, tokens: NDArray[np.int64], saliency: str, kind: str
) -> None:
    checkpoint, windows = Checkpoint.open(write_tiny(tmp_path, kind)), torch.from_numpy(tokens)
    [states] = StreamedModel(checkpoint).last_states([windows])
    method = SALIENCIES[saliency].output_gradient
    assert method is not None
    found, whole = (
        states_gradient(
            states,
            windows,
            final=torch.nn.functional.normalize,
            head=head_blocks(checkpoint.weights, checkpoint.shape, block_rows=rows),
            output_gradient=method,
        )
        for rows in (50, 8192)
    )
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))


def test_embedding_rows_are_those_of_the_whole_matrix(tiny_llama: Path, tokens: NDArray[np.int64]) -> None:
    weights, shape = SafetensorsWeights(tiny_llama), shape_from_config(config_json(tiny_llama))
    windows = torch.from_numpy(tokens)
    expected = weights.load("model.embed_tokens.weight")[windows]
    assert torch.equal(embedded(weights, shape, windows), expected)


def test_only_what_is_read_must_be_finite(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    folder = write_tiny(tmp_path, "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors[name][9] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = SafetensorsWeights(folder)
    assert torch.equal(weights.rows(name, slice(2, 5)), tensors[name][2:5])
    assert torch.equal(weights.rows(name, torch.tensor([8, 10])), tensors[name][[8, 10]])
    with pytest.raises(NirvanaError, match=r"embed_tokens\.weight.* 48 NaN or infinite"):
        weights.rows(name, slice(8, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_one_bad_weight_is_found_in_every_dtype(tmp_path: Path, dtype: torch.dtype, value: str) -> None:
    tensor = torch.randn(300, 70).to(dtype)
    save_file({"weight": tensor}, tmp_path / "model.safetensors")
    assert torch.equal(SafetensorsWeights(tmp_path).load("weight"), tensor)
    tensor[137, 33] = float(value)
    save_file({"weight": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(NirvanaError, match="holds 1 NaN or infinite"):
        SafetensorsWeights(tmp_path).load("weight")


def test_sums_over_blocks_are_the_sums(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    weights = {name: checkpoint.weights.load(name) for name in scored_tensors(checkpoint.shape, 1)}
    found = unit_sums(checkpoint.shape, 1, weights, block_elements=100)
    for part, whole in zip(found, unit_sums(checkpoint.shape, 1, weights), strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-12)


def test_strongest_logits_by_hand() -> None:
    logits = torch.tensor([[[1.0, 5.0], [3.0, 2.0]], [[0.0, 0.0], [-1.0, 4.0]]])  # [N=2, T=2, V=2]
    assert strongest_logits(logits, torch.zeros(2, 2)).item() == (3 + 5) / 2 + (0 + 4) / 2


def test_nirvana_on_a_two_layer_toy_by_hand() -> None:
    # f(x) = w2 * w1 * x at the position of the largest logit, so |w * df/dw| = |w1 w2 x| for both weights.
    w1, w2 = torch.tensor(-2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    inputs = torch.tensor([[1.0, -4.0, 2.0]])
    logits = (w2 * (w1 * inputs))[..., None]  # [1, 3, 1] = [-6, 24, -12]
    strongest_logits(logits, torch.zeros(1, 3)).backward()
    assert w1.grad is not None and w2.grad is not None
    assert (w1 * w1.grad).abs().item() == (w2 * w2.grad).abs().item() == 24.0


def test_next_token_loss_of_a_uniform_model_is_log_vocabulary() -> None:
    loss = next_token_loss(torch.zeros(3, 5, 11), torch.randint(0, 11, (3, 5)))
    assert loss.item() == pytest.approx(3 * np.log(11), rel=1e-6)


def test_magnitude_is_the_sum_of_absolute_weights(tiny: Path) -> None:
    shape, weights = shape_from_config(config_json(tiny)), SafetensorsWeights(tiny)
    scores = score_units(Checkpoint.open(tiny), None, saliency="magnitude")
    for layer in range(len(shape.layers)):
        total = sum(weights.load(name).double().abs().sum().item() for name in scored_tensors(shape, layer))
        assert scores.groups[layer].sum() + scores.neurons[layer].sum() == pytest.approx(total, rel=1e-9)


def test_random_scores_follow_the_seed(tiny_llama: Path) -> None:
    first, again, other = (
        score_units(Checkpoint.open(tiny_llama), None, saliency="random", seed=s) for s in (1, 1, 2)
    )
    assert_equal(first, again, rtol=0)
    assert not np.allclose(first.neurons[0], other.neurons[0])


def test_a_data_saliency_without_data_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(NirvanaError, match="needs calibration text"):
        score_units(Checkpoint.open(tiny_llama), None, saliency="taylor")


def test_nan_weights_are_named(tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    folder = write_tiny(tmp_path, "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NirvanaError, match=r"layers\.1\.mlp\.up_proj\.weight.* 1 NaN"):
        score_units(Checkpoint.open(folder), tokens)


def test_infinite_gradients_name_the_layer(tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    folder = write_tiny(tmp_path, "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NirvanaError, match="Layer 2"):
        score_units(Checkpoint.open(folder), tokens)
