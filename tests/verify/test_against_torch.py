"""The arrow checkpoint -> ONNX: the graph computes what the checkpoint computes, or says where not."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import numpy as np
import onnx
import pytest
import torch
from builders.damaged import damaged_copy
from builders.odd import edit
from builders.plans import plan_for
from builders.tiny import write_tiny

from nirvana_deploy.base.errors import NirvanaError, VerificationError
from nirvana_deploy.base.reading import typed
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, config_json
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.verify.against_torch import verify_onnx
from nirvana_deploy.verify.report import LogitsCheck, VerifyReport

STANDARD_OPERATORS = {"", "ai.onnx"}


@pytest.fixture(scope="module")
def pruned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, ONNX folder) of a pruned model of each kind."""
    folder = tmp_path_factory.mktemp("pruned")
    slice_checkpoint(Checkpoint.open(tiny), plan_for(tiny), folder / "checkpoint")
    onnx_from_checkpoint(Checkpoint.open(folder / "checkpoint"), folder / "onnx")
    return folder / "checkpoint", folder / "onnx"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the genai bindings while they load
@pytest.mark.consumer(
    "onnxruntime-genai",
    artifact="ONNX folder of tiny Llama, Mistral, Qwen2 and Qwen3, global",
    proof="greedy tokens equal torch's",
    package="onnxruntime-genai",
)
def test_the_pruned_graph_equals_its_checkpoint(pruned: tuple[Path, Path]) -> None:
    report = verify_onnx(*pruned, new_tokens=8)
    assert report.passed, report
    assert len(report.checks) == 5 and all(check.max_abs_diff >= 0 for check in report.checks)
    assert {check.runtime for check in report.greedy} == {"onnxruntime", "onnxruntime-genai"}
    assert typed(json.loads(json.dumps(report.to_json())), VerifyReport, "report") == report


def test_the_dense_graph_equals_its_checkpoint(tiny: Path, tmp_path: Path) -> None:
    onnx_from_checkpoint(Checkpoint.open(tiny), tmp_path / "onnx")
    assert verify_onnx(tiny, tmp_path / "onnx", new_tokens=8).passed


@pytest.mark.parametrize(("window", "seen"), [(70, True), (511, True), (70, False)])
def test_a_window_is_looked_beyond(tmp_path: Path, window: int, seen: bool) -> None:
    """A graph with another window departs nowhere else: all other comparisons are shorter."""
    model = edit(write_tiny(tmp_path / "model", "mistral-window"), sliding_window=window)
    exported = model if seen else edit(copytree(model, tmp_path / "wrong"), sliding_window=window + 4)
    onnx_from_checkpoint(Checkpoint.open(exported), tmp_path / "onnx")
    report = verify_onnx(model, tmp_path / "onnx", new_tokens=2, threads=1)
    assert report.passed == seen
    failed = {check.name for check in report.checks if not check.passed}
    beyond = f"prefill 1 x {window + 5}, then 3 decode steps"
    assert failed == (set() if seen else {beyond})
    assert (beyond in {check.name for check in report.checks}) == (window < 504)  # of a context of 512


def test_the_graph_is_portable(pruned: tuple[Path, Path]) -> None:
    checkpoint, folder = pruned
    shape = shape_from_config(config_json(checkpoint))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert {entry.domain for entry in model.opset_import} <= STANDARD_OPERATORS
    assert model.ir_version <= 10
    for node in model.graph.node:
        if node.op_type == "Attention":
            assert len(node.output) == 1 and not any(a.name == "is_causal" for a in node.attribute)
    inputs = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    for index, layer in enumerate(shape.layers):
        for kind in ("key", "value"):
            dimensions = inputs[f"past_key_values.{index}.{kind}"]
            assert dimensions[1].dim_value == layer.kv_heads and dimensions[3].dim_value == shape.head_dim
    outputs = [value.name for value in model.graph.output]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]


def test_weights_lie_in_one_relative_file(pruned: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = pruned
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    locations = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {"model.onnx.data"}
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    try:
        OrtDecoder(moved).prefill(np.array([[5, 6]]))
    finally:
        moved.rename(folder)


def test_the_export_is_deterministic(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        onnx_from_checkpoint(Checkpoint.open(tiny_llama), tmp_path / name)
    for file in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_checkpoint_gives_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = write_tiny(tmp_path / "whole", "mistral", dtype=dtype)
    shards = write_tiny(tmp_path / "shards", "mistral", dtype=dtype, max_shard_size="50KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    for folder in (whole, shards):
        onnx_from_checkpoint(Checkpoint.open(folder), folder / "onnx")
    for file in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (whole / "onnx" / file).read_bytes() == (shards / "onnx" / file).read_bytes()


def test_a_rope_that_depends_on_length_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama-tied")
    config = config_json(folder)
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NirvanaError, match="rope_type 'dynamic'"):
        onnx_from_checkpoint(Checkpoint.open(folder), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "llama3", "factor": 8.0}]
)
def test_scaled_rotary_embeddings_are_exported(tmp_path: Path, rope: dict[str, object]) -> None:
    folder = write_tiny(tmp_path / "model", "llama-tied")
    config = config_json(folder)
    extra = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config["rope_parameters"] = {
        "rope_theta": 500.0,
        **rope,
        **(extra if rope["rope_type"] == "llama3" else {}),
    }
    (folder / "config.json").write_text(json.dumps(config))
    onnx_from_checkpoint(Checkpoint.open(folder), tmp_path / "onnx")
    assert verify_onnx(folder, tmp_path / "onnx", new_tokens=4).passed


@pytest.mark.parametrize(
    ("initializer", "where"),
    [
        ("model.layers.1.self_attn.v_proj.weight", "layer 1"),
        ("model.layers.2.mlp.down_proj.weight", "layer 2"),
        ("model.norm.weight", "final norm or head"),
    ],
)
def test_the_first_departure_is_named(
    pruned: tuple[Path, Path], tmp_path: Path, initializer: str, where: str
) -> None:
    checkpoint, folder = pruned
    report = verify_onnx(checkpoint, damaged_copy(folder, tmp_path / "bad", initializer), new_tokens=4)
    assert not report.passed and report.first_departure == where
    with pytest.raises(VerificationError, match=where) as error:
        report.require_passed(folder)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("dense", [True, False])
def test_the_input_is_a_suspect_where_nothing_was_pruned(dense: bool) -> None:
    check = LogitsCheck("prefill 1 x 7", max_abs_diff=1.0, tolerance=0.1, passed=False)
    report = VerifyReport(checks=(check,), greedy=(), first_departure="layer 3")
    with pytest.raises(VerificationError, match="departure is at: layer 3") as error:
        report.require_passed(Path("onnx"), of_input=dense)
    assert ("the input is a suspect" in str(error.value)) == dense


def test_a_missing_model_names_the_next_command(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"holds no model\.onnx\.\nnirvana-deploy export"):
        verify_onnx(tiny_llama, tmp_path)
