"""Encoder-decoders: T5 (ungated, tied) and Flan-T5 (gated, untied), from scores to a loadable checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.plans import plan_for, shape_of
from builders.tiny import VOCABULARY
from builders.tiny_t5 import KINDS, write_t5
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.selfwrite import written_by_model
from nirvana_deploy.calibrate.windows import TokenWindows
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_checkpoint
from nirvana_deploy.model.reading import teacher_forced
from nirvana_deploy.model.weights import SafetensorsWeights, expected_shapes
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.choosing.select import select_cut
from nirvana_deploy.prune.cutting import Cutter
from nirvana_deploy.prune.divergence import masked_quality
from nirvana_deploy.prune.plan import pruned_shape
from nirvana_deploy.prune.plan_file import read_plan, write_plan
from nirvana_deploy.prune.recipe import Pruning
from nirvana_deploy.prune.refit.reconstruct import reconstruct_layers
from nirvana_deploy.prune.saliency.gradient import SALIENCIES
from nirvana_deploy.prune.slicing import MaskedWeights
from nirvana_deploy.prune.streaming.model import StreamedModel
from nirvana_deploy.prune.streaming.score import score_units

Tokens = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module", params=list(KINDS))
def t5(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5") / request.param, request.param)


@pytest.fixture
def halves(tokens: NDArray[np.int64]) -> Tokens:
    read, written = teacher_forced(tokens, start_token=0)
    return torch.from_numpy(read), torch.from_numpy(written)


def logits_of(folder: Path, halves: Tokens) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_checkpoint(folder)(
            input_ids=halves[0], decoder_input_ids=halves[1]
        ).logits
    return logits


def test_the_shape_speaks_of_both_stacks(t5: Path) -> None:
    shape, gated = shape_of(t5), t5.name == "flan-t5"
    assert [layer.site for layer in shape.layers] == ["encoder"] * 3 + ["decoder"] * 2 + ["cross"] * 2
    assert shape.neuron_cost == (3 if gated else 2) and shape.group_cost == 4 * 8
    assert shape.tied_embeddings is not gated
    model = load_checkpoint(t5)
    linears = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    assert shape.linear_parameters == linears
    assert set(expected_shapes(shape)) <= set(SafetensorsWeights(t5).names())
    assert shape.label(4) == "Layer 1 (decoder)"


@pytest.mark.parametrize("saliency", [name for name, method in SALIENCIES.items() if method.functional])
def test_streamed_scores_equal_full_backward(
    t5: Path, tokens: NDArray[np.int64], halves: Tokens, saliency: str
) -> None:
    model, functional = load_checkpoint(t5), SALIENCIES[saliency].functional
    assert functional is not None
    logits = model(input_ids=halves[0], decoder_input_ids=halves[1]).logits
    (functional(logits, halves[1]) / len(tokens)).backward()

    def score(linear: torch.nn.Linear) -> torch.Tensor:
        assert linear.weight.grad is not None
        return (linear.weight * linear.weight.grad).abs().detach().double()

    def heads(attention: Any) -> NDArray[np.float64]:
        rows = sum(score(linear).sum(1) for linear in (attention.q, attention.k, attention.v))
        return (rows + score(attention.o).sum(0)).reshape(-1, 8).sum(1).numpy()  # type: ignore[no-any-return]

    def neurons(ffn: Any) -> NDArray[np.float64]:
        names = ("wi_0", "wi_1") if hasattr(ffn, "wi_0") else ("wi",)
        rows = sum(score(getattr(ffn, name)).sum(1) for name in names)
        return (rows + score(ffn.wo).sum(0)).numpy()  # type: ignore[no-any-return]

    blocks = [*model.encoder.block, *model.decoder.block]
    groups = [heads(block.layer[0].SelfAttention) for block in blocks]
    groups += [heads(block.layer[1].EncDecAttention) for block in model.decoder.block]
    widths = [neurons(block.layer[-1].DenseReluDense) for block in blocks] + [np.zeros(0)] * 2
    found = score_units(Checkpoint.open(t5), tokens, saliency=saliency, micro_batch=4)
    for ours, expected in zip(found.groups + found.neurons, groups + widths, strict=True):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_streamed_logits_equal_transformers(t5: Path, tokens: NDArray[np.int64], halves: Tokens) -> None:
    streamed = StreamedModel(Checkpoint.open(t5)).logits(torch.from_numpy(tokens))
    torch.testing.assert_close(streamed, logits_of(t5, halves), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_sliced_equals_masked(
    t5: Path, tmp_path: Path, tokens: NDArray[np.int64], halves: Tokens, seed: int
) -> None:
    shape, plan = shape_of(t5), plan_for(t5, seed=seed)
    slice_checkpoint(Checkpoint.open(t5), plan, tmp_path / "pruned")
    masked = MaskedWeights(SafetensorsWeights(t5), shape, plan)
    expected = StreamedModel(Checkpoint.open(t5), masked).logits(torch.from_numpy(tokens))
    torch.testing.assert_close(logits_of(tmp_path / "pruned", halves), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits_of(t5, halves)).abs().max() > 0.1  # the cut does something
    assert shape_of(tmp_path / "pruned") == pruned_shape(shape, plan)


def test_kl_of_many_plans_equals_that_of_each_pruned_checkpoint(
    t5: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    plans = [plan_for(t5, seed=seed) for seed in range(2)]
    short = tokens[:2, :9]
    found = masked_quality(Checkpoint.open(t5), plans, [tokens, short])
    for windows, quality in zip((tokens, short), found, strict=True):
        read, written = map(torch.from_numpy, teacher_forced(windows, start_token=0))
        dense = logits_of(t5, (read, written)).log_softmax(-1)
        for index, plan in enumerate(plans):
            out = tmp_path / f"{index}-{windows.shape[1]}"
            slice_checkpoint(Checkpoint.open(t5), plan, out)
            pruned = logits_of(out, (read, written)).log_softmax(-1)
            kl = (dense.exp() * (dense - pruned)).sum(-1).mean(1)
            np.testing.assert_allclose(quality.divergence[index], kl, rtol=1e-3)
            loss = -pruned[:, :-1].gather(2, written[:, 1:, None]).mean((1, 2))
            np.testing.assert_allclose(quality.loss[index], loss, rtol=1e-4)


@pytest.mark.parametrize("reconstruct", [False, True])
def test_the_least_kl_is_chosen(
    reconstruct: bool, t5: Path, tokens: NDArray[np.int64], tmp_path: Path
) -> None:
    calibration = TokenWindows(tokens, "noise", "sha-a", seed=0, positions=tuple(range(0, 600, 100)))
    other = np.random.default_rng(8).integers(3, VOCABULARY, size=(4, 16))
    heldout = TokenWindows(other, "other", "sha-b", seed=None, positions=tuple(range(0, 64, 16)))
    recipe = Pruning(sparsity=0.3, allocation="global", round_to=4, reconstruct=reconstruct, ridge=1.0)
    selection = select_cut(
        Cutter(Checkpoint.open(t5), recipe, seed=0),
        [calibration],
        [heldout],
        saliencies=("nirvana", "random"),
        gammas=(1.0, 2.0),
        scratch=tmp_path,
    )
    kls = [candidate.kl for candidate in selection.candidates]
    assert len(kls) == 4 and selection.winner == int(np.argmin(kls)) and min(kls) > 0


def test_refitted_candidates_are_compared_refitted(
    t5: Path, tokens: NDArray[np.int64], tmp_path: Path
) -> None:
    dense, plan = Checkpoint.open(t5), plan_for(t5, seed=0)
    reconstruct_layers(dense, plan, tokens, tmp_path / "refit", ridge=1.0)
    slice_checkpoint(dense, plan, tmp_path / "out", reconstruction=tmp_path / "refit")
    [found] = masked_quality(dense, [plan], [tokens], reconstructions=[tmp_path / "refit"])
    [plain] = masked_quality(dense, [plan], [tokens])
    read, written = map(torch.from_numpy, teacher_forced(tokens, start_token=0))
    log_p = logits_of(t5, (read, written)).log_softmax(-1)
    log_q = logits_of(tmp_path / "out", (read, written)).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
    np.testing.assert_allclose(found.divergence[0], kl, rtol=1e-3)
    assert found.divergence.mean() < plain.divergence.mean()


def test_the_shared_position_bias_stays_whole_and_is_read_by_head(t5: Path, tmp_path: Path) -> None:
    plan = plan_for(t5, seed=0)
    for site in ("encoder", "decoder", "cross"):  # what other tests rely on: layers keep different heads
        assert len({layer.kept_groups for layer in plan.layers if layer.site == site}) > 1
    slice_checkpoint(Checkpoint.open(t5), plan, tmp_path / "pruned")
    name = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    dense, pruned = SafetensorsWeights(t5).load(name), SafetensorsWeights(tmp_path / "pruned").load(name)
    torch.testing.assert_close(dense, pruned, rtol=0, atol=0)
    layers = config_json(tmp_path / "pruned")["pruned_layers"]
    for layer in plan.layers:
        assert tuple(layers[layer.site][layer.layer]["kept_heads"]) == layer.kept_groups


def test_the_plan_survives_the_disk_and_names_its_sites(t5: Path, tmp_path: Path) -> None:
    plan = plan_for(t5, seed=0)
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    rows = json.loads((tmp_path / "plan.json").read_text())["layers"]
    assert [(row["site"], row["layer"]) for row in rows[2:6]] == [
        ("encoder", 2),
        ("decoder", 0),
        ("decoder", 1),
        ("cross", 0),
    ]
    assert all(row["kept_groups"] for row in rows)
    assert [row["of_neurons"] for row in rows] == [40] * 5 + [0] * 2


def test_pruning_twice_keeps_track_of_the_heads(
    t5: Path, tmp_path: Path, tokens: NDArray[np.int64], halves: Tokens
) -> None:
    slice_checkpoint(Checkpoint.open(t5), plan_for(t5, sparsity=0.2, seed=0), tmp_path / "once")
    shape, plan = shape_of(tmp_path / "once"), plan_for(tmp_path / "once", sparsity=0.3, seed=6)
    once = Checkpoint.open(tmp_path / "once")
    slice_checkpoint(once, plan, tmp_path / "twice")
    masked = MaskedWeights(once.weights, shape, plan)
    expected = StreamedModel(once, masked).logits(torch.from_numpy(tokens))
    torch.testing.assert_close(logits_of(tmp_path / "twice", halves), expected, rtol=1e-4, atol=1e-4)


def test_save_and_load_give_identical_logits(t5: Path, tmp_path: Path, halves: Tokens) -> None:
    slice_checkpoint(Checkpoint.open(t5), plan_for(t5, seed=0), tmp_path / "pruned")
    load_checkpoint(tmp_path / "pruned").save_pretrained(tmp_path / "again")
    again, pruned = logits_of(tmp_path / "again", halves), logits_of(tmp_path / "pruned", halves)
    torch.testing.assert_close(again, pruned, rtol=0, atol=0)
    assert shape_of(tmp_path / "again") == shape_of(tmp_path / "pruned")


def test_cached_generation_equals_the_whole_forward(t5: Path, tmp_path: Path, halves: Tokens) -> None:
    slice_checkpoint(Checkpoint.open(t5), plan_for(t5, seed=0), tmp_path / "pruned")
    model = load_checkpoint(tmp_path / "pruned")
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(halves[0], **options)
    torch.testing.assert_close(cached, model.generate(halves[0], use_cache=False, **options), rtol=0, atol=0)


@pytest.mark.integration
def test_a_fresh_process_loads_it_with_transformers_alone(t5: Path, tmp_path: Path, halves: Tokens) -> None:
    slice_checkpoint(Checkpoint.open(t5), plan_for(t5, seed=0), tmp_path / "pruned")
    script = """
import json, sys
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, encoder, decoder = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert "nirvana_deploy" not in sys.modules
with torch.no_grad():
    logits = model(input_ids=torch.tensor(encoder), decoder_input_ids=torch.tensor(decoder)).logits
generated = model.generate(torch.tensor(encoder), max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(json.dumps({"logits": logits[0, -1].tolist(), "shape": list(generated.shape)}))
"""
    arguments = [str(tmp_path / "pruned"), *(json.dumps(part[:2].tolist()) for part in halves)]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    loaded = json.loads(result.stdout.splitlines()[-1])
    expected = logits_of(tmp_path / "pruned", (halves[0][:2], halves[1][:2]))[0, -1]
    np.testing.assert_allclose(loaded["logits"], expected.numpy(), rtol=1e-5, atol=1e-5)
    assert loaded["shape"] == [2, 1 + 4]


def test_padding_of_the_input_changes_nothing(t5: Path, tmp_path: Path, halves: Tokens) -> None:
    slice_checkpoint(Checkpoint.open(t5), plan_for(t5, seed=0), tmp_path / "pruned")
    model, (encoder, decoder) = load_checkpoint(tmp_path / "pruned"), halves
    padded = torch.nn.functional.pad(encoder, (0, 3), value=5)
    mask = torch.nn.functional.pad(torch.ones_like(encoder), (0, 3))
    with torch.no_grad():
        logits = model(input_ids=padded, attention_mask=mask, decoder_input_ids=decoder).logits
    torch.testing.assert_close(logits, logits_of(tmp_path / "pruned", halves), rtol=1e-4, atol=1e-4)


def test_a_t5_does_not_write_its_own_calibration_text(t5: Path) -> None:
    with pytest.raises(NirvanaError, match="only a decoder-only model writes its own calibration text"):
        written_by_model(Checkpoint.open(t5), shapes={0: (1, 4)})


def test_infinite_gradients_name_the_layer(tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    folder = write_t5(tmp_path, "t5")
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.block.1.layer.2.DenseReluDense.wo.weight"] *= 1e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NirvanaError, match=r"Layer 1 \(decoder\)"):
        score_units(Checkpoint.open(folder), tokens)
