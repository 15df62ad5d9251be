"""LongRoPE: exact as far as the model was first trained, and no further; its reference is transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders.plans import logits_of, plan_for
from builders.tiny import VOCABULARY, write_tiny

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, config_json
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder

TRAINED = 24


@pytest.fixture(params=["scaled", "by two lengths"])
def phi(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    """As Phi-3 with 128k tokens and Phi-4-mini have it: 24 tokens at first, 96 later."""
    folder = write_tiny(tmp_path / "phi", "phi3")
    config = config_json(folder)
    pairs = config["head_dim"] // 4 if "head_dim" in config else config["hidden_size"] // 6 // 4
    factors = [1.0 + 0.7 * pair for pair in range(pairs)]
    rope = {"type": "longrope", "short_factor": factors, "long_factor": [3 * one for one in factors]}
    del config["rope_parameters"]
    changed = {
        "rope_scaling": rope if request.param == "scaled" else rope | {"attention_factor": 1.0},
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": TRAINED,
        "max_position_embeddings": 96,
    }
    (folder / "config.json").write_text(json.dumps(config | changed))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("cut", [False, True])
def test_it_computes_what_transformers_does_as_far_as_the_model_was_trained(
    phi: Checkpoint, tmp_path: Path, cut: bool
) -> None:
    if cut:
        slice_checkpoint(phi, plan_for(phi.path, sparsity=0.3), tmp_path / "cut")
        phi = Checkpoint.open(tmp_path / "cut")
    assert phi.context_tokens == TRAINED
    tokens = np.random.default_rng(1).integers(3, VOCABULARY, size=(2, TRAINED))
    onnx_from_checkpoint(phi, tmp_path / "onnx")
    said = json.loads((tmp_path / "onnx/genai_config.json").read_text())
    assert said["model"]["context_length"] == TRAINED
    with OrtDecoder(tmp_path / "onnx", threads=1) as decoder:
        logits, state = decoder.prefill(tokens[:, :-3])
        found = [logits]
        for position in range(TRAINED - 3, TRAINED):
            logits, state = decoder.decode(tokens[:, position : position + 1], state)
            found.append(logits)
    wanted = logits_of(phi.path, tokens).numpy()
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, rtol=1e-3, atol=1e-4)


def test_beyond_that_it_is_refused(phi: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=f"longer than the model's {TRAINED} positions"):
        phi.require_length(TRAINED + 1)
    onnx_from_checkpoint(phi, tmp_path / "onnx", flavor="static-cache", cache_tokens=16)
    assert json.loads((tmp_path / "onnx/config.json").read_text())["max_position_embeddings"] == TRAINED
    longer = np.random.default_rng(2).integers(3, VOCABULARY, size=(1, TRAINED + 1))
    near, far = (logits_of(phi.path, one)[:, :TRAINED] for one in (longer[:, :-1], longer))
    assert not np.allclose(near.numpy(), far.numpy(), rtol=1e-2)  # all angles are others there


@pytest.mark.parametrize("theta", ["", None, -1.0])
def test_a_theta_that_is_no_number_is_named(tmp_path: Path, theta: object) -> None:
    folder = write_tiny(tmp_path / "llama", "llama-tied")
    config = config_json(folder)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NirvanaError, match=r"rope_theta|rope_parameters"):
        Checkpoint.open(folder).rotary_frequencies("")


def test_one_of_several_rotary_embeddings_has_none(tmp_path: Path) -> None:
    """The context is the model's, and each kind of layer would have its own."""
    folder = write_tiny(tmp_path / "gemma", "gemma3")
    config = config_json(folder)
    kinds = config["rope_parameters"]
    factors = [1.0] * (config["head_dim"] // 2)
    longrope = {"rope_type": "longrope", "short_factor": factors, "long_factor": [3.0] * len(factors)}
    full = kinds["full_attention"] | longrope | {"factor": 4.0, "original_max_position_embeddings": TRAINED}
    (folder / "config.json").write_text(
        json.dumps(config | {"rope_parameters": kinds | {"full_attention": full}})
    )
    with pytest.raises(NirvanaError, match="Unsupported: rope_type 'longrope'"):
        Checkpoint.open(folder).rotary_frequencies("full_attention")
