"""What is particular to a decoder family: biases, head norms, sliding windows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.plans import logits_of
from builders.tiny import MORE_KINDS, write_tiny, write_tokenizer
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, config_json
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.families.refused import TAKE_OUT
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.model.weights import SafetensorsWeights
from nirvana_deploy.prune.plan import PrunePlan, make_plan
from nirvana_deploy.prune.slicing import SlicedWeights
from nirvana_deploy.prune.streaming.score import score_units


def plan_of(folder: Path, tokens: NDArray[np.int64] | None, *, saliency: str, round_to: int = 4) -> PrunePlan:
    shape = Checkpoint.open(folder).shape
    scores = score_units(Checkpoint.open(folder), tokens, saliency=saliency, seed=5)
    return make_plan(shape, scores, sparsity=0.4, gamma=1.0, round_to=round_to, saliency=saliency)


def test_biases_are_cut_with_their_groups_and_head_norms_stay(tmp_path: Path) -> None:
    for kind in ("qwen2", "qwen3"):
        folder = write_tiny(tmp_path / kind, kind)
        shape, plan = Checkpoint.open(folder).shape, plan_of(folder, None, saliency="random")
        weights, d = SlicedWeights(SafetensorsWeights(folder), shape, plan), shape.head_dim
        for index, layer in enumerate(plan.layers):
            prefix, groups = f"model.layers.{index}.self_attn", len(layer.kept_groups)
            if kind == "qwen2":
                assert weights.shape(f"{prefix}.q_proj.bias") == (2 * groups * d,)
                assert weights.load(f"{prefix}.k_proj.bias").shape == (groups * d,)
            else:
                assert d == 16 != shape.hidden_size // 6  # explicit, not derived
                assert weights.shape(f"{prefix}.q_norm.weight") == (d,)


def test_a_llama_in_qwen2_clothes_gets_the_same_plan(tmp_path: Path, tokens: NDArray[np.int64]) -> None:
    llama, twin = write_tiny(tmp_path / "llama", "llama-tied"), tmp_path / "qwen2"
    write_qwen2_twin(llama, twin)
    ours, theirs = (plan_of(folder, tokens, saliency="nirvana") for folder in (llama, twin))
    assert replace(theirs, model=ours.model) == ours


@pytest.mark.integration
def test_smollm2_in_qwen2_clothes_gets_the_same_plan(tmp_path: Path) -> None:
    llama, twin = resolve_model("smollm2").path, tmp_path / "qwen2"
    write_qwen2_twin(llama, twin)
    words = np.random.default_rng(0).integers(100, 49000, size=(1, 24))
    ours, theirs = (plan_of(folder, words, saliency="nirvana", round_to=8) for folder in (llama, twin))
    assert ours.budget.of_neurons == 30 * 1536
    assert replace(theirs, model=ours.model) == ours


def write_qwen2_twin(llama: Path, twin: Path) -> None:
    """The same function as a Qwen2: biases that are zero, everything else as it is."""
    twin.mkdir()
    config = config_json(llama) | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (twin / "config.json").write_text(json.dumps(config))
    tensors = load_file(llama / "model.safetensors")
    for name in list(tensors):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensors[name.replace(".weight", ".bias")] = torch.zeros(len(tensors[name]))
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})


QWEN_WINDOWS: dict[str, tuple[dict[str, object], list[int | None]]] = {
    "not used": ({"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1}, [None] * 3),
    "behind the last layer": (
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3, "layer_types": None},
        [None] * 3,
    ),
    "from a layer on": (
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2, "layer_types": None},
        [None, None, 64],
    ),
    "by type": (
        {
            "use_sliding_window": True,
            "sliding_window": 64,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        [None, 64, None],
    ),
}


@pytest.mark.parametrize("case", QWEN_WINDOWS)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_of_a_qwen_are_those_of_transformers(tmp_path: Path, kind: str, case: str) -> None:
    change, windows = QWEN_WINDOWS[case]
    checkpoint = changed_copy(write_tiny(tmp_path, kind), change)
    assert [layer.window for layer in checkpoint.computation.layers] == windows
    layers: Any = checkpoint.meta_model().model.layers
    assert [layer.self_attn.sliding_window for layer in layers] == windows


def test_every_layer_of_a_mistral_has_its_window(tmp_path: Path) -> None:
    checkpoint = changed_copy(write_tiny(tmp_path, "mistral"), {"sliding_window": 64})
    assert [layer.window for layer in checkpoint.computation.layers] == [64] * 3


def test_a_llama_has_no_window(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"sliding-window attention \(sliding_window = 64\)"):
        changed_copy(write_tiny(tmp_path, "llama-tied"), {"sliding_window": 64})


def changed_copy(folder: Path, change: dict[str, object]) -> Checkpoint:
    """The checkpoint after a change of config.json."""
    (folder / "config.json").write_text(json.dumps(config_json(folder) | change))
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"use_bidirectional_attention": True}, "attention to later tokens"),
        ({"final_logit_softcapping": 30.0}, "soft-capped logits"),
        ({"attn_logit_softcapping": 50.0}, "soft-capped attention"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu'"),
    ],
)
def test_what_a_gemma_may_ask_for_and_is_not_computed_is_refused(
    tmp_path: Path, change: dict[str, object], feature: str
) -> None:
    with pytest.raises(NirvanaError, match=feature):
        changed_copy(write_tiny(tmp_path, "gemma3"), change)


def test_a_group_of_turned_elements_that_the_operator_does_not_know_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    checkpoint = changed_copy(write_tiny(tmp_path / "m", "phi3"), {"rope_parameters": rope})
    with pytest.raises(NirvanaError, match=r"8 elements of a head are turned.*\n.*--flavor portable"):
        onnx_from_checkpoint(checkpoint, tmp_path / "onnx", flavor="gqa")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 8}, r"mixture of experts.*num_experts = 8"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "gpt_oss"}, "mixture of experts"),
        ({"model_type": "qwen3_5_text"}, "linear attention"),
        ({"model_type": "gemma4_text"}, "share the keys and values"),
        ({"model_type": "gemma2"}, "caps its logits"),
        ({"model_type": "granitemoehybrid"}, "a state in place of keys and values"),
        ({"model_type": "bert"}, "is an encoder"),
        ({"model_type": "gpt2"}, r"Supported: LlamaForCausalLM \(llama\)"),
    ],
)
def test_what_is_known_and_not_handled_says_what_it_would_need(config: dict[str, object], words: str) -> None:
    with pytest.raises(NirvanaError, match=words) as caught:
        shape_from_config(config)
    assert str(config["model_type"]) in caught.value.message


def test_the_text_part_of_a_vision_language_model_is_named_and_can_be_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = MORE_KINDS["gemma3"]()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "MODEL")
    write_tokenizer(tmp_path / "MODEL")
    with pytest.raises(NirvanaError, match=r"wraps a decoder.*gemma3_text") as caught:
        Checkpoint.open(tmp_path / "MODEL")
    assert TAKE_OUT in (caught.value.hint or "")
    monkeypatch.chdir(tmp_path)
    exec(TAKE_OUT)
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = whole(tokens).logits
    torch.testing.assert_close(logits_of(tmp_path / "TEXT-PART", tokens.numpy()), expected)
