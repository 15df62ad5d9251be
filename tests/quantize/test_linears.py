"""An ONNX folder opened for rewriting: linears are found by name, and what is written again is the same."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders.tiny import write_tiny
from builders.tiny_decoder import write_tiny_decoder
from numpy.typing import NDArray
from onnx import TensorProto, helper
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.quantize.graph.files import read_initializer
from nirvana_deploy.quantize.graph.linears import OnnxGraph, open_folder, write_folder
from nirvana_deploy.quantize.int8.rewrite import quantize_linear
from nirvana_deploy.quantize.int8.spec import Int8Linear
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder


@pytest.fixture(scope="module")
def llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX folder of the tied tiny Llama."""
    return onnx_from_checkpoint(Checkpoint.open(tiny_llama), tmp_path_factory.mktemp("linears") / "onnx").path


def test_every_linear_is_found_with_its_role_and_weight(llama: Path, tiny_llama: Path) -> None:
    (graph,) = open_folder(llama)
    layers = 3
    per_layer = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), layers)
    assert Counter(linear.role for linear in graph.linears) == per_layer | {"head": 1}
    weights = load_file(tiny_llama / "model.safetensors")
    for linear in graph.linears:
        name = "model.embed_tokens" if linear.role == "head" else linear.name
        expected = weights[f"{name}.weight"].T
        np.testing.assert_array_equal(linear.read_weight(), expected)
        assert expected.shape == (linear.K, linear.N)
        assert linear.layer is None or f".{linear.layer}." in linear.name
    assert graph.linears[-1].name == "lm_head" and graph.linears[-1].transposed


def test_written_again_it_computes_the_same_and_keeps_the_other_files(
    llama: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    graphs = open_folder(llama)
    written = write_folder(llama, tmp_path / "again", graphs, records={"quantization.json": {"schema": 1}})
    assert written == (tmp_path / "again/model.onnx.data").stat().st_size
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {path.name for path in llama.iterdir()} | {"quantization.json"}
    expected, _ = OrtDecoder(llama).prefill(tokens)
    found, _ = OrtDecoder(tmp_path / "again").prefill(tokens)
    np.testing.assert_array_equal(found, expected)


def test_rewrites_stack_and_replaced_weights_are_not_written(
    llama: Path, tmp_path: Path, tokens: NDArray[np.int64]
) -> None:
    (graph,) = open_folder(llama)
    before = graph.weights_bytes
    for linear in graph.linears:
        graph.rewrite(linear.weight, lambda w: w * 2) if not linear.transposed else None
    for linear in graph.linears:
        half = graph.initializer(
            f"{linear.name}.half",
            linear.dtype,
            (linear.K, linear.N),
            lambda linear=linear: linear.read_weight() / (1 if linear.transposed else 2),
        )
        y = graph.node("MatMul", [linear.x, half], before=linear.node, name=f"{linear.name}.again")
        graph.replace(linear, y)
    write_folder(llama, tmp_path / "out", [graph])
    head = graph.linears[-1]
    assert graph.weights_bytes == before + 4 * head.K * head.N  # the embedding stays for the lookup
    expected, _ = OrtDecoder(llama).prefill(tokens)
    found, _ = OrtDecoder(tmp_path / "out").prefill(tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_unknown_names_are_linears_without_a_role(tmp_path: Path) -> None:
    (graph,) = open_folder(write_tiny_decoder(tmp_path))
    assert [linear.name for linear in graph.linears] == [
        *(f"{part}.{layer}" for layer in range(2) for part in "qkvo"),
        "head",
    ]
    assert {linear.role for linear in graph.linears} == {"other"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_reading_widens_to_float32(llama: Path, dtype: str) -> None:
    import onnx_ir as ir

    (graph,) = open_folder(llama)
    linear = graph.linears[0]
    narrow = ir.DataType[dtype.upper()]
    weight = linear.read_weight().astype(narrow.numpy())
    linear.weight.const_value = ir.Tensor(weight, name="w")
    linear.weight.dtype = narrow
    found = linear.read_weight()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, weight.astype(np.float32))
    assert read_initializer(linear.weight).dtype == narrow.numpy()


def _graph_of(nodes: list[onnx.NodeProto], weight: NDArray[np.generic], path: Path) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    path.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path / "model.onnx")
    return path


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    one = np.array(1, dtype=np.float32)
    plain = _graph_of([helper.make_node("Add", ["x", "w"], ["y"])], one, tmp_path / "plain")
    with pytest.raises(NirvanaError, match="no linear to quantize"):
        open_folder(plain)
    quantized = _graph_of(
        [helper.make_node("QuantizeLinear", ["x", "w"], ["q"], name="quantize_x"),
         helper.make_node("DequantizeLinear", ["q", "w"], ["y"])],
        one,
        tmp_path / "quantized",
    )  # fmt: skip
    with pytest.raises(NirvanaError, match=r"quantized already: node 'quantize_x' is a QuantizeLinear"):
        open_folder(quantized)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NirvanaError, match=r"holds no \*.onnx file"):
        open_folder(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(NirvanaError, match="not a valid ONNX model"):
        open_folder(tmp_path / "broken")
    with pytest.raises(NirvanaError, match="does not exist"):
        OnnxGraph(tmp_path / "model.onnx")


def test_external_data_must_be_there_and_inside(tmp_path: Path) -> None:
    folder = write_tiny_decoder(tmp_path / "tiny")
    data = folder / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-8])
    with pytest.raises(NirvanaError, match=f"ends at byte {len(whole) - 8}"):
        open_folder(folder)
    data.unlink()
    with pytest.raises(NirvanaError, match="is not there"):
        open_folder(folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere.data"
    (tmp_path / "elsewhere.data").write_bytes(whole)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NirvanaError, match="outside its folder"):
        open_folder(folder)
    data.write_bytes(whole)
    tensor = next(one for one in model.graph.initializer if one.external_data)
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = "model.onnx.data"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NirvanaError, match="outside its folder"):  # the others
        open_folder(folder)
    tensor.dims[0] += 1
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NirvanaError, match=r"of shape \[.*\] \d+ bytes, not \d+"):
        open_folder(folder)
    tensor.external_data[1].value = "here"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NirvanaError, match="a part of its graph is malformed"):
        open_folder(folder)


def test_a_folder_is_not_written_over_its_source(llama: Path) -> None:
    with pytest.raises(NirvanaError, match="cannot be written while it is read"):
        write_folder(llama, llama, open_folder(llama))


def test_biased_and_untied_models_have_the_same_roles(tmp_path: Path) -> None:
    folder = onnx_from_checkpoint(
        Checkpoint.open(write_tiny(tmp_path / "m", "llama-biased")), tmp_path / "onnx"
    ).path
    (graph,) = open_folder(folder)
    head = graph.linears[-1]
    assert head.name == "lm_head" and head.role == "head" and not head.transposed
    assert "other" not in {linear.role for linear in graph.linears}


def _peak_bytes(tmp_path: Path, layers: int) -> int:
    """Of Python's allocations, numpy's included, while a decoder of ``layers`` layers is written in int8."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / f"model{layers}")
    folder = onnx_from_checkpoint(
        Checkpoint.open(tmp_path / f"model{layers}"), tmp_path / f"onnx{layers}"
    ).path
    tracemalloc.start()
    (graph,) = open_folder(folder)
    for linear in graph.linears:
        if linear.role != "head":
            quantize_linear(graph, linear, Int8Linear(bound=1.0))
    write_folder(folder, tmp_path / f"int8-{layers}", [graph])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    layer_bytes = 4 * (4 * 256 * 256 + 3 * 256 * 1024)
    shallow, deep = (_peak_bytes(tmp_path, layers) for layers in (2, 8))
    assert shallow > layer_bytes / 4  # one weight was seen in float
    assert deep - shallow < 6 * layer_bytes / 10  # names and scales grow, weights do not
