"""Least squares after the cut: the normal equations, brute force, and units that are copies of each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_t5
from builders.jobs import SHORT
from builders.plans import logits_of, plan_for
from builders.tiny import write_tiny
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nirvana_deploy import prune_export
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.cli.main import commands
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_checkpoint
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.reading import teacher_forced
from nirvana_deploy.model.weights import SafetensorsWeights
from nirvana_deploy.output.records import read_records
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.divergence import masked_quality
from nirvana_deploy.prune.plan import PrunePlan
from nirvana_deploy.prune.plan_file import read_plan
from nirvana_deploy.prune.refit.fitting import Fit, fitted
from nirvana_deploy.prune.refit.least_squares import NormalEquations, Refit
from nirvana_deploy.prune.refit.readers import Reader
from nirvana_deploy.prune.refit.reconstruct import reconstruct_layers
from nirvana_deploy.prune.saliency.units import kept_positions
from nirvana_deploy.prune.slicing import ReplacedWeights, SlicedWeights
from nirvana_deploy.report.facts import details


def case(*, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [30, 4], correlated and of unlike scale, a weight [5, 4], and what it should give [30, 5]."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 0.5
    inputs = inputs * torch.logspace(-1, 1, 4)
    weight = torch.randn(5, 4, generator=generator)
    wanted = inputs @ (weight + 0.1 * torch.randn(5, 4, generator=generator)).T
    wanted = wanted + 0.1 * torch.randn(30, 5, generator=generator)
    return inputs.to(dtype), weight.to(dtype), wanted.to(dtype)


def solved(inputs: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor, ridge: float) -> Refit:
    equations = NormalEquations(weight)
    for x, y in zip(inputs.split(7), wanted.split(7), strict=True):
        equations.observe(x[None], y[None])
    refit = equations.solve(ridge)
    assert refit is not None
    return refit


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 3.0])
def test_the_gradient_of_the_objective_is_zero_at_the_refit(ridge: float) -> None:
    inputs, weight, wanted = case()
    found = solved(inputs, weight, wanted, ridge).weight.requires_grad_()
    delta = found - weight
    objective = (wanted - inputs @ found.T).square().sum()
    energy = inputs.square().sum(0)
    objective = objective + ridge * (delta.square() * (energy + 0.1 * energy.mean())).sum()
    (gradient,) = torch.autograd.grad(objective, found)
    scale = (weight.abs() @ (inputs.T @ inputs).abs()).max()
    assert gradient.abs().max() < 1e-12 * scale
    assert delta.abs().max() > 1e-3


def test_the_share_explained_is_what_the_residual_says() -> None:
    inputs, weight, wanted = case()
    refit = solved(inputs, weight, wanted, 0.1)
    before = (wanted - inputs @ weight.T).square().sum()
    after = (wanted - inputs @ refit.weight.T).square().sum()
    assert refit.explained_share == pytest.approx(float(1 - after / before), abs=1e-12)
    assert 0 < refit.explained_share < 1


def test_a_linear_that_misses_nothing_stays() -> None:
    inputs, weight, _ = case()
    refit = solved(inputs, weight, inputs @ weight.T, 0.1)
    torch.testing.assert_close(refit.weight, weight, rtol=1e-12, atol=1e-12)


def test_a_large_ridge_changes_nothing_and_silent_inputs_keep_their_weights() -> None:
    inputs, weight, wanted = case()
    torch.testing.assert_close(solved(inputs, weight, wanted, 1e12).weight, weight, rtol=1e-9, atol=1e-9)
    inputs[:, 2] = 0
    found = solved(inputs, weight, wanted, 0.1).weight
    assert torch.equal(found[:, 2], weight[:, 2]) and not torch.equal(found[:, 0], weight[:, 0])


def test_the_scale_of_all_inputs_does_not_matter_and_a_quiet_one_gets_no_large_weight() -> None:
    inputs, weight, wanted = case()
    plain = solved(inputs, weight, wanted, 0.1).weight
    scaled = solved(1000 * inputs, weight / 1000, wanted, 0.1).weight * 1000
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-9)
    inputs[:, 1] /= 1000
    quiet = solved(inputs, weight, wanted, 0.1).weight
    changes = [(found - weight)[:, 1].abs().max() for found in (plain, quiet)]
    assert 0 < changes[1] < changes[0]


def test_float32_sums_are_close_to_float64() -> None:
    found = solved(*case(dtype=torch.float32), 0.1).weight
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), solved(*case(), 0.1).weight, rtol=1e-4, atol=1e-4)


def copied(folder: Path, plan: PrunePlan) -> None:
    """Overwrite every unit that the plan cuts with a kept one, except for its columns of o and down."""
    shape = shape_from_config(config_json(folder))
    tensors = load_file(folder / "model.safetensors")
    for position, layer in enumerate(plan.layers):
        site, prefix = shape.place(position)
        g, d = shape.query_heads_per_group, shape.head_dim
        rows = {site.q: g * d, site.k: d, site.v: d}
        kinds: list[tuple[dict[str, int], int, tuple[int, ...]]] = [
            (rows, layer.of_groups, layer.kept_groups)
        ]
        kinds.append((dict.fromkeys(site.ffn_rows, 1), layer.of_neurons, layer.kept_neurons))
        for modules, count, kept in kinds:
            for unit in set(range(count)) - set(kept):
                for module, size in modules.items():
                    for name in (f"{prefix}.{module}.weight", f"{prefix}.{module}.bias"):
                        if name in tensors:
                            of = kept[unit % len(kept)] * size
                            tensors[name][unit * size : (unit + 1) * size] = tensors[name][of : of + size]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path, plan: PrunePlan, tokens: NDArray[np.int64], out: Path, **options: Any) -> Path:
    """The reconstructed checkpoint."""
    reconstruct_layers(Checkpoint.open(folder), plan, tokens, out / "reconstruction", **options)
    slice_checkpoint(Checkpoint.open(folder), plan, out / "pruned", reconstruction=out / "reconstruction")
    return out / "pruned"


@pytest.mark.parametrize("kind", ["llama-tied", "llama-biased", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_cut_copies_of_kept_units_cost_nothing(
    tmp_path: Path, tokens: NDArray[np.int64], kind: str, allocation: str
) -> None:
    folder = write_tiny(tmp_path / "dense", kind)
    plan = plan_for(folder, allocation=allocation)
    copied(folder, plan)
    dense = logits_of(folder, tokens)
    slice_checkpoint(Checkpoint.open(folder), plan, tmp_path / "plain")
    assert (logits_of(tmp_path / "plain", tokens) - dense).abs().max() > 0.1
    pruned = cut(folder, plan, tokens, tmp_path, ridge=1e-7)
    torch.testing.assert_close(logits_of(pruned, tokens), dense, rtol=2e-3, atol=2e-3)


def in_memory(
    folder: Path,
    plan: PrunePlan,
    inputs: dict[str, torch.Tensor],
    readers: Sequence[tuple[str, str]],
    ridge: float,
) -> dict[str, torch.Tensor]:
    """The same by brute force: for each (norm, linear) both whole models run, and lstsq solves for W."""
    kept = kept_positions(shape_from_config(config_json(folder)), plan.kept_groups, plan.kept_neurons)
    dense, made = load_checkpoint(folder), load_checkpoint(folder)
    found = {}
    for norm, linear in readers:
        stay = kept[f"{linear}.weight"].positions
        entered, x, _ = seen_at(made, norm, linear, inputs)
        dense_entered, _, dense_y = seen_at(dense, norm, linear, inputs)
        module = made.get_submodule(linear)
        x, weight = x[:, stay], module.weight.double()[:, stay]
        bias = 0 if module.bias is None else module.bias.double()
        wanted, states = dense_entered + dense_y - entered - bias, dense_entered + dense_y
        share = states.square().mean(-1, keepdim=True).rsqrt()
        x, wanted = x * share, wanted * share
        energy = x.square().sum(0)
        penalty = torch.diag((ridge * (energy + 0.1 * energy.mean())).sqrt())
        solution = torch.linalg.lstsq(
            torch.cat([x, penalty]), torch.cat([wanted, penalty @ weight.T])
        ).solution
        found[f"{linear}.weight"] = solution.T.float()
        whole = torch.zeros_like(module.weight)
        module.weight = torch.nn.Parameter(whole.index_copy(1, stay, solution.T.float()))
    return found


def seen_at(
    model: Any, norm: str, linear: str, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 [positions, width]: what the norm reads, what the linear reads and what it gives."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(norm).register_forward_pre_hook(lambda _, args: seen.update(entered=args[0])),
        model.get_submodule(linear).register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y)),
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    entered, x, y = (seen[name].flatten(0, -2).double() for name in ("entered", "x", "y"))
    return entered, x, y


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_streaming_equals_the_whole_model_in_memory(
    tiny: Path, tmp_path: Path, tokens: NDArray[np.int64], micro_batch: int
) -> None:
    plan = plan_for(tiny)
    record = reconstruct_layers(
        Checkpoint.open(tiny), plan, tokens, tmp_path / "r", ridge=0.1, micro_batch=micro_batch
    )
    streamed = SafetensorsWeights(tmp_path / "r")
    readers = [
        (f"model.layers.{layer}.{norm}", f"model.layers.{layer}.{linear}")
        for layer in range(3)
        for norm, linear in (
            ("input_layernorm", "self_attn.o_proj"),
            ("post_attention_layernorm", "mlp.down_proj"),
        )
    ]
    expected = in_memory(tiny, plan, {"input_ids": torch.from_numpy(tokens)}, readers, 0.1)
    assert sorted(expected) == streamed.names() == sorted(record.explained_share)
    for name, weight in expected.items():
        torch.testing.assert_close(streamed.load(name), weight, rtol=2e-3, atol=2e-4)
    assert all(0 < share <= 1 for share in record.explained_share.values())


@pytest.mark.parametrize("kind", list(tiny_t5.KINDS))
def test_both_stacks_of_an_encoder_decoder_are_refitted(
    tmp_path: Path, tokens: NDArray[np.int64], kind: str
) -> None:
    folder = tiny_t5.write_t5(tmp_path / "dense", kind)
    plan = plan_for(folder, seed=0)
    reconstruct_layers(Checkpoint.open(folder), plan, tokens, tmp_path / "r", ridge=0.1, micro_batch=4)
    encoder = ("encoder", 3, ["SelfAttention.o", "DenseReluDense.wo"])
    decoder = ("decoder", 2, ["SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"])
    readers = [
        (f"{stack}.block.{block}.layer.{place}.layer_norm", f"{stack}.block.{block}.layer.{place}.{linear}")
        for stack, blocks, linears in (encoder, decoder)
        for block in range(blocks)
        for place, linear in enumerate(linears)
    ]
    read, written = map(torch.from_numpy, teacher_forced(tokens, start_token=0))
    expected = in_memory(folder, plan, {"input_ids": read, "decoder_input_ids": written}, readers, 0.1)
    streamed = SafetensorsWeights(tmp_path / "r")
    assert sorted(expected) == streamed.names()
    for name, weight in expected.items():
        torch.testing.assert_close(streamed.load(name), weight, rtol=2e-3, atol=2e-4)
    slice_checkpoint(Checkpoint.open(folder), plan, tmp_path / "pruned", reconstruction=tmp_path / "r")
    for name in expected:
        assert torch.equal(SafetensorsWeights(tmp_path / "pruned").load(name), streamed.load(name))


def test_the_refitted_model_is_closer_to_the_dense_one(
    tiny: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    plan, dense = plan_for(tiny), logits_of(tiny, tokens)
    slice_checkpoint(Checkpoint.open(tiny), plan, tmp_path / "plain")
    refitted = cut(tiny, plan, tokens, tmp_path)
    far, near = ((logits_of(one, tokens) - dense).norm() for one in (tmp_path / "plain", refitted))
    assert near < 0.9 * far
    [quality] = masked_quality(
        Checkpoint.open(tiny), [plan, plan], [tokens], reconstructions=[None, tmp_path / "reconstruction"]
    )
    assert quality.divergence[1].mean() < quality.divergence[0].mean()
    expected = (
        logits_of(refitted, tokens).log_softmax(-1)[:, :-1].gather(2, torch.tensor(tokens)[:, 1:, None])
    )
    np.testing.assert_allclose(quality.loss[1], -expected[..., 0].double().mean(1), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(
    tmp_path: Path, tokens: NDArray[np.int64], dtype: torch.dtype
) -> None:
    half = write_tiny(tmp_path / "half", "llama-tied", dtype=dtype)
    tensors = {name: tensor.float() for name, tensor in load_file(half / "model.safetensors").items()}
    single = write_tiny(tmp_path / "single", "llama-tied")
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    plan = plan_for(half)
    pruned = cut(half, plan, tokens, tmp_path)
    assert {tensor.dtype for tensor in load_file(pruned / "model.safetensors").values()} == {dtype}
    reconstruct_layers(Checkpoint.open(single), plan, tokens, tmp_path / "float32")
    first = "model.layers.0.self_attn.o_proj.weight"  # nothing rounded stands before it
    expected = SafetensorsWeights(tmp_path / "float32").load(first)
    assert torch.equal(SafetensorsWeights(pruned).load(first), expected.to(dtype))


def test_a_fixed_ridge_is_larger_where_inputs_outnumber_tokens(
    tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    met: dict[int, float] = {}

    def noted(reader: Reader, *args: Any, ridge: float, **more: Any) -> Fit:
        met[reader.linear.weight.shape[1]] = ridge
        return fitted(reader, *args, ridge=ridge, **more)

    monkeypatch.setattr("nirvana_deploy.prune.refit.reconstruct.fitted", noted)
    few = tokens[:1, :20]
    plan = plan_for(tiny_llama, sparsity=0.3)
    reconstruct_layers(Checkpoint.open(tiny_llama), plan, few, tmp_path / "few", ridge=0.5)
    assert max(met) > few.size
    assert met == {width: pytest.approx(0.5 * max(1, width / few.size)) for width in met}


def test_weights_of_another_plan_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(3, 200, size=(6, 20))
    reconstruct_layers(Checkpoint.open(tiny_llama), plan_for(tiny_llama), tokens, tmp_path / "r")
    shape, other = shape_from_config(config_json(tiny_llama)), plan_for(tiny_llama, sparsity=0.2)
    sliced = SlicedWeights(SafetensorsWeights(tiny_llama), shape, other)
    with pytest.raises(NirvanaError, match=r"reconstructed with shape \[48, .* another plan's"):
        ReplacedWeights(sliced, SafetensorsWeights(tmp_path / "r"))


def test_bad_requests_are_sentences(tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    plan = plan_for(tiny_llama)
    with pytest.raises(NirvanaError, match=r"up to 48 inputs .* 2 windows of 5 are 10") as refused:
        reconstruct_layers(Checkpoint.open(tiny_llama), plan, tokens[:2, :5], tmp_path / "r")
    assert refused.value.hint == "Pass --num-sequences 10 or more, or --no-reconstruct."
    with pytest.raises(NirvanaError, match="ridge must be a positive number, got 0"):
        reconstruct_layers(Checkpoint.open(tiny_llama), plan, tokens, tmp_path / "r", ridge=0)
    other = replace(plan, model=plan.model | {"hidden_size": 96})
    with pytest.raises(NirvanaError, match="does not fit the model"):
        reconstruct_layers(Checkpoint.open(tiny_llama), other, tokens, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_activations_that_overflow_are_named(tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    folder = write_tiny(tmp_path / "loud", "llama-tied")
    plan = plan_for(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NirvanaError, match=r"layers\.1\.mlp\.down_proj\.weight: its inputs are NaN or infinite"
    ):
        reconstruct_layers(Checkpoint.open(folder), plan, tokens, tmp_path / "r")
    assert list(tmp_path.iterdir()) == [folder]


OPTIONS: dict[str, Any] = {
    "sparsity": 0.3,
    "gamma": 1.0,
    "round_to": 4,
    "num_sequences": 4,
    "seq_len": 16,
    **SHORT,
}


def pruned(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Stage -> its record in the manifest, after ``prune``."""
    done = prune_export(str(model), out=out, until="checkpoint", **(OPTIONS | options))
    recorded: dict[str, Any] = done.manifest["stages"]
    return recorded


def test_a_run_reconstructs_resumes_and_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    first = pruned(tiny_llama, tmp_path / "out", reconstruct=True)
    assert list(first) == ["calibrate", "score", "plan", "reconstruct", "checkpoint"]
    assert first["reconstruct"]["result"]["tokens"] == 64
    assert read_plan(tmp_path / "out/plan.json").reconstruct == {
        "ridge": first["reconstruct"]["result"]["ridge"]
    }
    written = SafetensorsWeights(tmp_path / "out/checkpoint")
    for name, share in first["reconstruct"]["result"]["explained_share"].items():
        assert torch.equal(written.load(name), SafetensorsWeights(tmp_path / "out/reconstruction").load(name))
        assert 0 < share < 1

    facts = dict(dict(details(read_records(tmp_path / "out")))["Pruning"])
    assert facts["Reconstruction"].startswith("6 output projections refitted on 64 calibration tokens, ridge")

    (tmp_path / "out/checkpoint/model.safetensors").unlink()
    again = pruned(tiny_llama, tmp_path / "out", reconstruct=True, resume=True)
    assert again["reconstruct"] == first["reconstruct"]  # its seconds too: it was not done again
    assert again["checkpoint"]["files"] == first["checkpoint"]["files"]

    with pytest.raises(NirvanaError, match="made with reconstruct True, not False"):
        pruned(tiny_llama, tmp_path / "out", resume=True)
    plain = pruned(tiny_llama, tmp_path / "plain")
    assert list(plain) == ["calibrate", "score", "plan", "checkpoint"]
    assert plain["checkpoint"]["files"] != first["checkpoint"]["files"]
    assert "reconstruct" not in json.loads((tmp_path / "plain/plan.json").read_text())


def test_a_folder_of_a_version_that_knew_no_reconstruction_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    pruned(tiny_llama, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    del manifest["options"]["reconstruct"]
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(NirvanaError, match="planned by a version that does not reconstruct"):
        pruned(tiny_llama, tmp_path / "out", reconstruct=True, resume=True)


def test_a_plan_alone_gives_the_plain_cut(tiny_llama: Path, tmp_path: Path) -> None:
    pruned(tiny_llama, tmp_path / "out", reconstruct=True)
    plain = pruned(tiny_llama, tmp_path / "plain")
    command = ["prune", str(tiny_llama), "--plan", str(tmp_path / "out/plan.json"), "--out"]
    done = CliRunner().invoke(commands, [*command, str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    assert "a plan alone gives the cut alone" in done.stderr
    manifest = json.loads((tmp_path / "again/manifest.json").read_text())
    assert manifest["stages"]["checkpoint"]["files"] == plain["checkpoint"]["files"]
    refused = CliRunner().invoke(commands, [*command, str(tmp_path / "never"), "--reconstruct"])
    assert refused.exit_code == 2 and "--plan reads no calibration text" in refused.stderr


@pytest.mark.parametrize("kind", ["prune", "prune-export"])
def test_too_few_tokens_are_refused_before_any_work(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    command = [kind, str(tiny_llama), "--out", str(tmp_path / "out"), "--preset", "paper", "--reconstruct"]
    done = CliRunner().invoke(
        commands, [*command, "--sparsity", "0.3", "--num-sequences", "2", "--seq-len", "5"]
    )
    assert done.exit_code == 1 and isinstance(done.exception, NirvanaError)
    assert "up to 48 inputs" in done.exception.message
    assert done.exception.hint == "Pass --num-sequences 10 or more, or --no-reconstruct."
    assert not (tmp_path / "out").exists()
