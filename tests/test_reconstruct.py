"""Least squares after the cut: the normal equations, and a model whose cut units are copies of kept ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_t5
import torch
from click.testing import CliRunner
from conftest import write_tiny
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from test_slicing import logits_of, plan_for

from nirvana_deploy import pipeline, stages
from nirvana_deploy.cli.main import commands
from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.model.checkpoint import config_json, load_checkpoint
from nirvana_deploy.model.shape import shape_from_config
from nirvana_deploy.model.weights import SafetensorsWeights
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.least_squares import CutLinear
from nirvana_deploy.prune.plan import PrunePlan, read_plan
from nirvana_deploy.prune.reconstruct import reconstruct_layers
from nirvana_deploy.prune.score_seq2seq import teacher_forced
from nirvana_deploy.prune.slicing import ReplacedWeights, SlicedWeights
from nirvana_deploy.prune.units import kept_positions

KEPT = torch.tensor([0, 2, 3, 6])


def case(*, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [30, 8], correlated and of unlike scale, and a weight [5, 8]."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 8, generator=generator) @ torch.randn(8, 8, generator=generator) + 0.5
    return (inputs * torch.logspace(-1, 1, 8)).to(dtype), torch.randn(5, 8, generator=generator).to(dtype)


def refitted(inputs: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    linear = CutLinear(weight, kept)
    for part in inputs.split(7):
        linear.observe(part[None])
    return linear.refit(ridge).weight


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 3.0])
def test_the_gradient_of_the_objective_is_zero_at_the_refit(ridge: float) -> None:
    inputs, weight = case()
    found = refitted(inputs, weight, KEPT, ridge).requires_grad_()
    kept = inputs[:, KEPT]
    delta = found - weight[:, KEPT]
    objective = (inputs @ weight.T - kept @ found.T).square().sum()
    objective = objective + ridge * (delta.square() * kept.square().sum(0)).sum()
    (gradient,) = torch.autograd.grad(objective, found)
    scale = (weight.abs() @ (inputs.T @ inputs).abs()).max()
    assert gradient.abs().max() < 1e-12 * scale
    assert delta.abs().max() > 1e-3


def test_the_share_explained_is_what_the_residual_says() -> None:
    inputs, weight = case()
    linear = CutLinear(weight, KEPT)
    linear.observe(inputs)
    refit = linear.refit(0.1)
    dense, kept = inputs @ weight.T, inputs[:, KEPT]
    lost = (dense - kept @ weight[:, KEPT].T).square().sum()
    still = (dense - kept @ refit.weight.T).square().sum()
    assert refit.explained_share == pytest.approx(float(1 - still / lost), abs=1e-12)
    assert 0 < refit.explained_share < 1


def test_all_columns_kept_changes_nothing() -> None:
    inputs, weight = case()
    assert torch.equal(refitted(inputs, weight, torch.arange(8), 0.1), weight)


def test_a_large_ridge_gives_the_plain_cut_and_silent_inputs_keep_their_weights() -> None:
    inputs, weight = case()
    torch.testing.assert_close(refitted(inputs, weight, KEPT, 1e12), weight[:, KEPT], rtol=1e-9, atol=1e-9)
    inputs[:, 2] = 0
    found = refitted(inputs, weight, KEPT, 0.1)
    assert torch.equal(found[:, 1], weight[:, 2]) and not torch.equal(found[:, 0], weight[:, 0])


def test_the_scale_of_an_input_does_not_matter() -> None:
    inputs, weight = case()
    scale = torch.logspace(-3, 3, 8, dtype=torch.float64)
    scaled = refitted(inputs * scale, weight / scale, KEPT, 0.1)
    torch.testing.assert_close(
        scaled * scale[KEPT], refitted(inputs, weight, KEPT, 0.1), rtol=1e-9, atol=1e-9
    )


def test_float32_sums_are_close_to_float64() -> None:
    inputs, weight = case()
    found = refitted(inputs.float(), weight.float(), KEPT, 0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), refitted(inputs, weight, KEPT, 0.1), rtol=1e-4, atol=1e-4)


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
    reconstruct_layers(folder, plan, tokens, out / "reconstruction", **options)
    slice_checkpoint(folder, plan, out / "pruned", reconstruction=out / "reconstruction")
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
    slice_checkpoint(folder, plan, tmp_path / "plain")
    assert (logits_of(tmp_path / "plain", tokens) - dense).abs().max() > 0.1
    pruned = cut(folder, plan, tokens, tmp_path, ridge=1e-7)
    torch.testing.assert_close(logits_of(pruned, tokens), dense, rtol=2e-3, atol=2e-3)


def in_memory(
    folder: Path, plan: PrunePlan, inputs: dict[str, torch.Tensor], names: Sequence[str], ridge: float
) -> dict[str, torch.Tensor]:
    """The same by brute force: the whole model runs for each linear, one lstsq solves for its weight."""
    kept = kept_positions(shape_from_config(config_json(folder)), plan.kept_groups, plan.kept_neurons)
    model = load_checkpoint(folder)
    found = {}
    for name in names:
        stay = kept[name].positions
        module = model.get_submodule(name.removesuffix(".weight"))
        seen: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**inputs)
        handle.remove()
        x = seen[0].flatten(0, -2).double()
        y, weight = x @ module.weight.double().T, module.weight.double()[:, stay]
        norms = x[:, stay].norm(dim=0)
        penalty = torch.diag(ridge**0.5 * torch.where(norms > 0, norms, 1.0))  # dead ReLU neurons
        system = torch.cat([x[:, stay], penalty])
        target = torch.cat([y, penalty @ weight.T])
        found[name] = torch.linalg.lstsq(system, target).solution.T.float()
        whole = torch.zeros_like(module.weight)
        module.weight = torch.nn.Parameter(whole.index_copy(1, stay, found[name]))
    return {name: weight for name, weight in found.items() if weight.shape[1] < plan_width(folder, name)}


def plan_width(folder: Path, name: str) -> int:
    return SafetensorsWeights(folder).shape(name)[1]


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_streaming_equals_the_whole_model_in_memory(
    tiny: Path, tmp_path: Path, tokens: NDArray[np.int64], micro_batch: int
) -> None:
    plan = plan_for(tiny)
    record = reconstruct_layers(tiny, plan, tokens, tmp_path / "r", ridge=0.1, micro_batch=micro_batch)
    streamed = SafetensorsWeights(tmp_path / "r")
    names = [
        f"model.layers.{layer}.{module}.weight"
        for layer in range(3)
        for module in ("self_attn.o_proj", "mlp.down_proj")
    ]
    expected = in_memory(tiny, plan, {"input_ids": torch.from_numpy(tokens)}, names, 0.1)
    assert sorted(expected) == streamed.names() == sorted(record.explained_share)
    for name, weight in expected.items():
        torch.testing.assert_close(streamed.load(name), weight, rtol=2e-3, atol=2e-4)
    assert all(0 < share <= 1 for share in record.explained_share.values())


@pytest.mark.parametrize("kind", list(tiny_t5.KINDS))
def test_both_stacks_of_an_encoder_decoder_are_refitted(
    tmp_path: Path, tokens: NDArray[np.int64], kind: str
) -> None:
    folder = tiny_t5.write_t5(tmp_path / "dense", kind)
    plan = tiny_t5.plan_for(folder)
    reconstruct_layers(folder, plan, tokens, tmp_path / "r", ridge=0.1, micro_batch=4)
    encoder = [("encoder", 3, ["0.SelfAttention.o", "1.DenseReluDense.wo"])]
    decoder = [("decoder", 2, ["0.SelfAttention.o", "1.EncDecAttention.o", "2.DenseReluDense.wo"])]
    names = [
        f"{stack}.block.{block}.layer.{module}.weight"
        for stack, blocks, modules in encoder + decoder
        for block in range(blocks)
        for module in modules
    ]
    read, written = teacher_forced(torch.from_numpy(tokens), start_token=0)
    expected = in_memory(folder, plan, {"input_ids": read, "decoder_input_ids": written}, names, 0.1)
    streamed = SafetensorsWeights(tmp_path / "r")
    assert sorted(expected) == streamed.names()
    for name, weight in expected.items():
        torch.testing.assert_close(streamed.load(name), weight, rtol=2e-3, atol=2e-4)
    slice_checkpoint(folder, plan, tmp_path / "pruned", reconstruction=tmp_path / "r")
    assert torch.equal(SafetensorsWeights(tmp_path / "pruned").load(names[-1]), streamed.load(names[-1]))


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
    reconstruct_layers(single, plan, tokens, tmp_path / "float32")
    first = next(iter(SafetensorsWeights(tmp_path / "float32").names()))
    expected = SafetensorsWeights(tmp_path / "float32").load(first)
    assert torch.equal(SafetensorsWeights(pruned).load(first), expected.to(dtype))


def test_weights_of_another_plan_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(3, 200, size=(6, 20))
    reconstruct_layers(tiny_llama, plan_for(tiny_llama), tokens, tmp_path / "r")
    shape, other = shape_from_config(config_json(tiny_llama)), plan_for(tiny_llama, sparsity=0.2)
    sliced = SlicedWeights(SafetensorsWeights(tiny_llama), shape, other)
    with pytest.raises(NirvanaError, match=r"reconstructed with shape \[48, .* another plan's"):
        ReplacedWeights(sliced, SafetensorsWeights(tmp_path / "r"))


def test_bad_requests_are_sentences(tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    plan = plan_for(tiny_llama)
    with pytest.raises(NirvanaError, match=r"up to 48 inputs .* 2 windows of 20 are 40") as refused:
        reconstruct_layers(tiny_llama, plan, tokens[:2], tmp_path / "r")
    assert refused.value.hint == "Pass --num-sequences 3 or more, or --no-reconstruct."
    with pytest.raises(NirvanaError, match="ridge must be a positive number, got 0"):
        reconstruct_layers(tiny_llama, plan, tokens, tmp_path / "r", ridge=0)
    other = replace(plan, model=plan.model | {"hidden_size": 96})
    with pytest.raises(NirvanaError, match="does not fit the model"):
        reconstruct_layers(tiny_llama, other, tokens, tmp_path / "r")
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
        reconstruct_layers(folder, plan, tokens, tmp_path / "r")
    assert list(tmp_path.iterdir()) == [folder]


OPTIONS: dict[str, Any] = {"sparsity": 0.3, "gamma": 1.0, "round_to": 4, "num_sequences": 4, "seq_len": 16}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "HELDOUT_SEQUENCES", 3)
    monkeypatch.setattr(stages, "HELDOUT_LEN", 24)


def pruned(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Stage -> its record in the manifest, after ``prune``."""
    done = pipeline.prune_export(str(model), out=out, until="checkpoint", **(OPTIONS | options))
    recorded: dict[str, Any] = done.manifest["stages"]
    return recorded


@pytest.mark.usefixtures("short")
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


@pytest.mark.usefixtures("short")
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
    options = ["--sparsity", "0.3", "--reconstruct", "--num-sequences", "2", "--seq-len", "16"]
    done = CliRunner().invoke(commands, [kind, str(tiny_llama), "--out", str(tmp_path / "out"), *options])
    assert done.exit_code == 1 and isinstance(done.exception, NirvanaError)
    assert "up to 48 inputs" in done.exception.message
    assert done.exception.hint == "Pass --num-sequences 3 or more, or --no-reconstruct."
    assert not (tmp_path / "out").exists()
