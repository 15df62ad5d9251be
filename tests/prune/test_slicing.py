"""The arrows plan -> slice -> checkpoint: sliced equals masked, and what is written loads anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.plans import logits_of, plan_for
from builders.tiny import VOCABULARY, write_tiny
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SilentProgress
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_checkpoint
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.weights import SafetensorsWeights, check_weights
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import pruned_shape
from nirvana_deploy.prune.slicing import MaskedWeights, SlicedWeights
from nirvana_deploy.prune.streaming.model import StreamedModel
from nirvana_deploy.prune.streaming.score import score_units


def test_the_plan_makes_layers_differ(tiny_llama: Path) -> None:
    layers = pruned_shape(Checkpoint.open(tiny_llama).shape, plan_for(tiny_llama)).layers
    assert len({layer.kv_heads for layer in layers}) > 1 and len({layer.ffn_width for layer in layers}) > 1


@pytest.mark.parametrize("seed", range(3))
def test_sliced_equals_masked(tiny: Path, tmp_path: Path, tokens: NDArray[np.int64], seed: int) -> None:
    shape = Checkpoint.open(tiny).shape
    plan = plan_for(tiny, seed=seed)
    slice_checkpoint(Checkpoint.open(tiny), plan, tmp_path / "pruned")
    masked = MaskedWeights(SafetensorsWeights(tiny), shape, plan)
    expected = StreamedModel(Checkpoint.open(tiny), masked).logits(torch.from_numpy(tokens))
    dense = logits_of(tiny, tokens)
    torch.testing.assert_close(logits_of(tmp_path / "pruned", tokens), expected, rtol=1e-4, atol=1e-4)
    assert (expected - dense).abs().max() > 0.1  # the cut does something


def test_views_leave_the_source_alone(tiny_llama: Path) -> None:
    shape, source = Checkpoint.open(tiny_llama).shape, SafetensorsWeights(tiny_llama)
    plan = plan_for(tiny_llama)
    name = "model.layers.0.mlp.down_proj.weight"
    before = source.load(name).clone()
    sliced = SlicedWeights(source, shape, plan)
    MaskedWeights(source, shape, plan).load(name)
    assert sliced.load(name).shape == sliced.shape(name) == (48, len(plan.layers[0].kept_neurons))
    torch.testing.assert_close(source.load(name), before, rtol=0, atol=0)
    kept = list(plan.layers[0].kept_neurons)
    torch.testing.assert_close(sliced.load(name), before[:, kept], rtol=0, atol=0)
    for view in (sliced, MaskedWeights(source, shape, plan)):
        assert torch.equal(view.rows(name, slice(3, 9)), view.load(name)[3:9])
        assert torch.equal(
            view.rows("model.embed_tokens.weight", slice(3, 9)),
            source.rows("model.embed_tokens.weight", slice(3, 9)),
        )


def test_save_and_load_give_identical_logits(tiny: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    slice_checkpoint(Checkpoint.open(tiny), plan_for(tiny), tmp_path / "pruned")
    model = load_checkpoint(tmp_path / "pruned")
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        logits_of(tmp_path / "again", tokens), logits_of(tmp_path / "pruned", tokens), rtol=0, atol=0
    )


def test_shards_hold_the_same_tensors(tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    plan = plan_for(tiny_llama)
    slice_checkpoint(Checkpoint.open(tiny_llama), plan, tmp_path / "one")
    slice_checkpoint(Checkpoint.open(tiny_llama), plan, tmp_path / "many", shard_bytes=40_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    torch.testing.assert_close(
        logits_of(tmp_path / "many", tokens), logits_of(tmp_path / "one", tokens), rtol=0, atol=0
    )


def test_bf16_weights_stay_bf16(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "dense", "llama-tied", dtype=torch.bfloat16)
    slice_checkpoint(Checkpoint.open(folder), plan_for(folder), tmp_path / "pruned")
    tensors = load_file(tmp_path / "pruned" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.consumer(
    "transformers",
    artifact="HF folder, global: tiny Llama, Mistral, Qwen2, Qwen3",
    proof="a fresh process loads it with the module beside the weights, and its logits are the same",
    package="transformers",
)
def test_a_fresh_process_loads_it_with_transformers_alone(
    tiny: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    slice_checkpoint(Checkpoint.open(tiny), plan_for(tiny), tmp_path / "pruned")
    script = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert "nirvana_deploy" not in sys.modules
with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits
generated = model.generate(torch.tensor(tokens), max_new_tokens=4, do_sample=False)
print(json.dumps({"logits": logits[0, -1].tolist(), "shape": list(generated.shape)}))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "pruned"), json.dumps(tokens[:2].tolist())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "per-layer" not in result.stderr  # no warning about ambiguous widths either
    loaded = json.loads(result.stdout.splitlines()[-1])
    expected = logits_of(tmp_path / "pruned", tokens[:2])[0, -1]
    np.testing.assert_allclose(loaded["logits"], expected.numpy(), rtol=1e-5, atol=1e-5)
    assert loaded["shape"] == [2, tokens.shape[1] + 4]


LOADS_STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
folder, tokens = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
assert type(model).__module__.startswith("transformers."), type(model)
assert "nirvana_deploy" not in sys.modules
with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits
print(json.dumps({"architecture": type(model).__name__, "logits": logits.tolist()}))
"""


def write_six_groups(folder: Path, **config: object) -> Path:
    """A random Llama of six KV groups with two heads each, of which five do not divide the hidden size."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4}
    widths = {"intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **widths, initializer_range=0.2, **config))
    model.save_pretrained(folder)
    return folder


@pytest.mark.consumer(
    "transformers",
    artifact="HF folder, uniform: tiny Llama",
    proof="a stock class loads it without code of its own, and its logits are the same",
    package="transformers",
)
@pytest.mark.parametrize(
    ("sparsity", "heads", "architecture"),
    [(0.2, 10, "MistralForCausalLM"), (0.34, 8, "LlamaForCausalLM")],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_uniform_checkpoint_is_stock(
    tmp_path: Path, tokens: NDArray[np.int64], sparsity: float, heads: int, architecture: str, tied: bool
) -> None:
    folder = write_six_groups(
        tmp_path / "dense",
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    )
    plan, shape = (
        plan_for(folder, sparsity=sparsity, allocation="uniform"),
        Checkpoint.open(folder).shape,
    )
    written = slice_checkpoint(Checkpoint.open(folder), plan, tmp_path / "pruned")
    assert written == Checkpoint.open(tmp_path / "pruned").shape
    assert (written.layers[0].query_heads, written.family.architecture) == (heads, architecture)
    assert not list((tmp_path / "pruned").glob("*.py"))
    result = subprocess.run(
        [sys.executable, "-c", LOADS_STOCK, str(tmp_path / "pruned"), json.dumps(tokens[:2].tolist())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    loaded = json.loads(result.stdout.splitlines()[-1])
    assert loaded["architecture"] == architecture
    masked = MaskedWeights(SafetensorsWeights(folder), shape, plan)
    expected = StreamedModel(Checkpoint.open(folder), masked).logits(torch.from_numpy(tokens[:2]))
    np.testing.assert_allclose(loaded["logits"], expected.numpy(), rtol=1e-4, atol=1e-4)
    assert (logits_of(folder, tokens[:2]) - expected).abs().max() > 0.1


def test_relabelling_is_said(tmp_path: Path) -> None:
    folder = write_six_groups(tmp_path / "dense")
    notes: list[str] = []

    class Notes(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    plan = plan_for(folder, sparsity=0.2, allocation="uniform")
    slice_checkpoint(Checkpoint.open(folder), plan, tmp_path / "pruned", progress=Notes())
    assert len(notes) == 1 and "MistralForCausalLM" in notes[0] and "10 heads" in notes[0]


def test_a_uniform_llama_with_biases_that_does_not_fit_travels_with_its_code(
    tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    folder = write_six_groups(tmp_path / "dense", attention_bias=True)
    plan, shape = plan_for(folder, sparsity=0.2, allocation="uniform"), Checkpoint.open(folder).shape
    slice_checkpoint(Checkpoint.open(folder), plan, tmp_path / "pruned")
    assert (tmp_path / "pruned" / "modeling_nirvana.py").is_file()
    masked = MaskedWeights(SafetensorsWeights(folder), shape, plan)
    expected = StreamedModel(Checkpoint.open(folder), masked).logits(torch.from_numpy(tokens))
    torch.testing.assert_close(logits_of(tmp_path / "pruned", tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_pruned_checkpoint_can_be_scored_again(
    tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    slice_checkpoint(Checkpoint.open(tiny_llama), plan_for(tiny_llama, sparsity=0.2), tmp_path / "pruned")
    shape = Checkpoint.open(tmp_path / "pruned").shape
    scores = score_units(Checkpoint.open(tmp_path / "pruned"), tokens)
    assert [len(groups) for groups in scores.groups] == [layer.kv_heads for layer in shape.layers]


def test_weights_that_do_not_fit_the_config_are_named(tiny_llama: Path) -> None:
    shape = Checkpoint.open(tiny_llama).shape
    wider = replace(shape, layers=(replace(shape.layers[0], ffn_width=41), *shape.layers[1:]))
    with pytest.raises(NirvanaError, match=r"layers\.0\.mlp.* \[48, 40\].* \[48, 41\]"):
        check_weights(SafetensorsWeights(tiny_llama), wider)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "llama-tied")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(NirvanaError, match=r"model\.safetensors is truncated or corrupt"):
        SafetensorsWeights(folder)


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "llama-tied", max_shard_size="50KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(NirvanaError, match=shard.name):
        SafetensorsWeights(folder)


def test_an_index_that_points_outside_its_folder_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama-tied", max_shard_size="50KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(NirvanaError, match="outside its folder"):
        SafetensorsWeights(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "gpt2"}, r"Unsupported architecture.*gpt2.*LlamaForCausalLM"),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "Mixtral"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3Moe"),
        ({"model_type": "phimoe", "architectures": ["PhimoeForCausalLM"]}, "mixture of experts"),
        ({"sliding_window": 128}, "sliding-window attention"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"intermediate_size": None}, "'intermediate_size' expected int, got NoneType"),
        ({"num_key_value_heads": 4}, "not a multiple of its 4 KV heads"),
    ],
)
def test_a_config_that_we_do_not_handle_is_refused_by_name(
    tiny_llama: Path, change: dict[str, object], complaint: str
) -> None:
    with pytest.raises(NirvanaError, match=complaint):
        shape_from_config(config_json(tiny_llama) | change)
