"""Linears that read one value as one product: the same numbers, fewer nodes, and each still counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders.plans import plan_for
from builders.tiny import KINDS, write_tiny
from numpy.typing import NDArray
from safetensors.torch import load_file

from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.export.packed import packed_name, parent_of, unpacked_names
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.quantize.coverage import coverage_of
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.graph.files import read_initializer
from nirvana_deploy.quantize.graph.layer_parts import Cut
from nirvana_deploy.quantize.graph.linears import open_folder, write_folder
from nirvana_deploy.quantize.int8 import decide as choose
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.schemes import SCHEMES
from nirvana_deploy.quantize.weights import low_bit
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder

HEAD_DIM = 16  # GroupQueryAttention takes multiples of it
LAYERS = 3
Q_K_V, GATE_UP = "self_attn.q_proj+k_proj+v_proj", "mlp.gate_proj+up_proj"


@pytest.fixture(scope="module", params=list(KINDS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model of each kind, whose layers differ, in the flavor for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("packing") / request.param
    checkpoint = write_tiny(folder / "dense", request.param, head_dim=HEAD_DIM)
    slice_checkpoint(Checkpoint.open(checkpoint), plan_for(checkpoint), folder / "checkpoint")
    return onnx_from_checkpoint(Checkpoint.open(folder / "checkpoint"), folder / "onnx", flavor="gqa").path


def test_an_exported_graph_opens_as_the_linears_of_its_checkpoint(
    source: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    """Names, weights and biases; and taken apart it computes what it computed together."""
    (graph,) = open_folder(source)
    stored = load_file(source.parent / "checkpoint" / "model.safetensors")
    linears = {linear.name: linear for linear in graph.linears if linear.role != "head"}
    assert sorted(f"{name}.weight" for name in linears) == sorted(n for n in stored if "_proj.weight" in n)
    assert {linear.role for linear in linears.values()} == {"q", "k", "v", "o", "gate", "up", "down"}
    for name, linear in linears.items():
        np.testing.assert_array_equal(linear.read_weight(), stored[f"{name}.weight"].T.numpy())
    initializers = graph.model.graph.initializers
    for name in (name for name in stored if name.endswith("_proj.bias")):
        np.testing.assert_array_equal(read_initializer(initializers[name]), stored[name].numpy())
    write_folder(source, tmp_path / "apart", [graph])
    apart = onnx.load(tmp_path / "apart" / "model.onnx", load_external_data=False).graph
    assert not any("+" in tensor.name for tensor in apart.initializer)
    assert "Split" not in {node.op_type for node in apart.node}
    decoders = [OrtDecoder(folder, threads=1) for folder in (source, tmp_path / "apart")]
    one, other = (decoder.prefill(tokens[:2, :9])[0] for decoder in decoders)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_values_of_linears_apart_are_computed_from_the_packed_file(
    source: Path, tokens: NDArray[np.int64]
) -> None:
    """What fitting relies on: results by linear, and weights that stand in for those of one linear."""
    (graph,) = open_folder(source)
    cut, prompt = Cut(source / "model.onnx", threads=1), {"input_ids": tokens[:1, :9]}
    _, k, _, _, gate, up, _ = [linear for linear in graph.linears if linear.layer == 0]
    for linear in (k, gate, up):
        name, x = linear.node.outputs[0].name, linear.x.name
        weight = linear.read_weight()
        ((found, read),) = cut.values([name, x], {}, [prompt])
        np.testing.assert_allclose(found, read @ weight, rtol=0, atol=1e-5)
        ((doubled,),) = cut.values([name], {}, [prompt], {linear.weight.name: 2 * weight})
        np.testing.assert_allclose(doubled, 2 * found, rtol=1e-5, atol=1e-5)


def test_packed_linears_compute_the_same(
    source: Path, tmp_path: Path, tokens: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = {
        scheme: quantize_onnx(
            source,
            tmp_path / f"{scheme}-together",
            Quantization(scheme=scheme, head=True),
            calibration=tokens,
        )
        for scheme in ("int8", "w8", "w4")
    }
    for module in (choose, low_bit):
        monkeypatch.setattr(module, "siblings", lambda linears, **_: ((linear,) for linear in linears))
    for scheme, packed in together.items():
        apart = quantize_onnx(
            source, tmp_path / f"{scheme}-apart", Quantization(scheme=scheme, head=True), calibration=tokens
        )
        logits, states = zip(
            *(OrtDecoder(one.path).prefill(tokens[:2, :9]) for one in (packed, apart)), strict=True
        )
        np.testing.assert_array_equal(*logits)
        for one, other in zip(*(state.cache for state in states), strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy())
        assert packed.coverage.found == packed.coverage.promised == apart.coverage.promised
        assert (
            packed.record["weights_bytes"] < 1.1 * apart.record["weights_bytes"]
        )  # what is small lies in the graph itself


def test_attention_takes_them_packed_unless_heads_are_normed(source: Path, tmp_path: Path) -> None:
    folder = quantize_onnx(source, tmp_path / "w4", Quantization(scheme="w4")).path
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    names = {value for node in nodes for value in node.input}
    assert sum(f".{Q_K_V}.weight_quantized" in name for name in names) == LAYERS
    assert sum(f".{GATE_UP}.weight_quantized" in name for name in names) == LAYERS
    counts = Counter(node.op_type for node in nodes)
    attentions = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    normed, biased = "qwen3" in str(source), "llama-biased" in str(source)
    assert all(bool(node.input[1]) == bool(node.input[2]) == normed for node in attentions)
    assert counts["Split"] == LAYERS * (2 if normed else 1)
    assert counts["MatMulNBits"] == 4 * LAYERS
    assert counts["Add"] == LAYERS * (4 if biased else "qwen2" in str(source))  # one for each product


def test_a_graph_that_tensorrt_reads_stays_apart(
    tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    source = onnx_from_checkpoint(Checkpoint.open(tiny_llama), tmp_path / "onnx").path
    for scheme, writing in (("int8", "ort"), ("w4", "tensorrt")):
        folder = quantize_onnx(
            source,
            tmp_path / scheme,
            Quantization(scheme=scheme, smooth="none", writing=writing),
            calibration=tokens,
        ).path
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        assert not any("+" in tensor.name for tensor in model.graph.initializer)
        assert "Split" not in {node.op_type for node in model.graph.node}


def test_different_decisions_are_not_packed(
    tiny_llama: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    """What --keep-fp leaves in float stays apart, and the siblings that remain are packed."""
    checkpoint = write_tiny(tmp_path / "dense", "mistral", head_dim=HEAD_DIM)
    source = onnx_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / "onnx", flavor="gqa").path
    done = quantize_onnx(
        source, tmp_path / "int8", Quantization(scheme="int8", smooth="none", keep_fp=5), calibration=tokens
    )
    model = onnx.load(done.path / "model.onnx", load_external_data=False)
    held = {
        name
        for tensor in model.graph.initializer
        if tensor.name.endswith(".weight_quantized")
        for name in unpacked_names(tensor.name.removesuffix(".weight_quantized"))
    }
    kept = set(done.record["int8"]["kept_float"]) - {"lm_head"}
    assert len(kept) == 5 and not kept & held
    assert held == set(done.record["int8"]["linears"])
    assert done.coverage.found == len(held) == 7 * LAYERS - 5
    floats = {
        name: tensor.name
        for tensor in model.graph.initializer
        for name in unpacked_names(tensor.name.removesuffix(".weight"))
        if name in kept
    }
    assert floats.keys() == kept
    for name, stored in floats.items():  # those that read one value are one product again
        together = [other for other in kept if parent_of(other) == parent_of(name)]
        assert ("+" in stored) == (len(together) > 1 and not name.endswith(("o_proj", "down_proj")))


def test_a_packed_linear_that_runs_in_float_is_missed_with_all_it_holds(
    tiny_llama: Path, tmp_path: Path
) -> None:
    source = onnx_from_checkpoint(Checkpoint.open(tiny_llama), tmp_path / "onnx").path
    folder = quantize_onnx(source, tmp_path / "w4", Quantization(scheme="w4")).path
    promised = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert coverage_of(folder, promised, kernels=SCHEMES["w4"].integer_kernels).missing == ()
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    packed = f"model.layers.1.{GATE_UP}.weight_quantized"
    for tensor in model.graph.initializer:
        if tensor.name == packed:
            tensor.name = "something"
    for node in model.graph.node:
        node.input[:] = ["something" if name == packed else name for name in node.input]
        node.input[:] = [name.replace(GATE_UP, "else") for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace(GATE_UP, "else")
    for node in model.graph.node:
        node.output[:] = [name.replace(GATE_UP, "else") for name in node.output]
    onnx.save(model, folder / "model.onnx")
    assert coverage_of(folder, promised, kernels=SCHEMES["w4"].integer_kernels).missing == tuple(promised[:2])


def test_names_of_packed_linears() -> None:
    names = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    assert packed_name(names) == "model.layers.0.mlp.gate_proj+up_proj"
    assert unpacked_names(packed_name(names)) == names
    assert unpacked_names("lm_head") == ("lm_head",) and unpacked_names(names[0]) == names[:1]
