"""The embedding as codes: the head's own bytes where they are tied, exact rows, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from builders.exact_int8 import require_exact_int8
from builders.tiny import KINDS, write_tiny
from builders.tiny_t5 import write_t5
from numpy.typing import NDArray

from nirvana_deploy.export.footprint import footprint_of
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.weights import SafetensorsWeights
from nirvana_deploy.output.layout import DATA_FILE, DECODER_FILE, ENCODER_FILE
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.weights import write as weight_only
from nirvana_deploy.quantize.weights.rounding import round_weight
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder, session_outputs
from nirvana_deploy.runtime.onnxruntime.encoder_decoder import OrtSeq2Seq, encoder_values
from nirvana_deploy.runtime.runner import greedy_tokens

TABLE = "model.embed_tokens"
BLOCK = 16
TIED = {"llama-tied", "qwen2"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have rows of 48, three blocks of 16 and no whole number of 32."""
    monkeypatch.setattr(weight_only, "PER_CHANNEL_BLOCK", BLOCK)


def nodes_of(path: Path, operator: str) -> list[onnx.NodeProto]:
    graph = onnx.load(path, load_external_data=False).graph
    return [node for node in graph.node if node.op_type == operator]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("scheme", ["w8", "w4"])
def test_rows_are_the_rounded_rows(tmp_path: Path, tokens: NDArray[np.int64], kind: str, scheme: str) -> None:
    checkpoint = write_tiny(tmp_path / "dense", kind)
    source = onnx_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / "onnx").path
    done = quantize_onnx(source, tmp_path / scheme, Quantization(scheme=scheme, block_size=BLOCK, head=True))
    holder = "lm_head" if kind in TIED else TABLE
    assert done.record["embeddings"] == {TABLE: f"codes of {holder}"}
    assert nodes_of(done.path / "model.onnx", "Gather") == []
    (lookup,) = nodes_of(done.path / "model.onnx", "GatherBlockQuantized")
    assert lookup.input[2] == f"{holder}.weight_scale"

    table = SafetensorsWeights(checkpoint).load(f"{TABLE}.weight").numpy()
    bits, block = (8, 48) if scheme == "w8" else (4, BLOCK)
    rounded = round_weight(table.T, bits=bits, block_size=block, search=True).dequantized().T
    found = session_outputs(done.path, tokens[:1, :9], [f"{TABLE}.rows"])[f"{TABLE}.rows"]
    np.testing.assert_allclose(found[0], rounded[tokens[0, :9]], rtol=0, atol=1e-6)
    assert np.abs(rounded - table).max() > 1e-4  # they are not the float rows


def test_a_tied_embedding_is_not_stored_again(
    tmp_path: Path, tiny_llama: Path, tokens: NDArray[np.int64]
) -> None:
    source = onnx_from_checkpoint(Checkpoint.open(tiny_llama), tmp_path / "onnx").path
    sizes, floats = {}, {}
    for head in (False, True):
        folder = quantize_onnx(
            source, tmp_path / str(head), Quantization(scheme="w4", block_size=BLOCK, head=head)
        ).path
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        floats[head] = [tensor.name for tensor in graph.initializer if tensor.name == f"{TABLE}.weight"]
        sizes[head] = footprint_of(folder).weight_bytes_per_step
        readers = [node.op_type for node in graph.node if "lm_head.weight_quantized" in node.input]
        assert readers == (["Reshape", "MatMulNBits"] if head else [])
    assert floats == {False: [f"{TABLE}.weight"], True: []}
    V, D = 272, 48
    scales = 4 * V * D // BLOCK
    assert sizes[False] - sizes[True] == pytest.approx(4 * V * D - V * D // 2 - scales, abs=100)
    expected, found = (OrtDecoder(tmp_path / name).prefill(tokens[:2])[0] for name in ("onnx", "True"))
    assert np.abs(found - expected).max() < 0.5 * np.abs(expected).max()


@pytest.mark.parametrize("flavor", ["gqa", "portable"])
def test_int8_for_onnx_runtime_alone(tmp_path: Path, tokens: NDArray[np.int64], flavor: str) -> None:
    """8-bit rows of its own, since the head's product has its codes in another layout."""
    checkpoint = write_tiny(tmp_path / "dense", "llama-tied", head_dim=16)
    source = onnx_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / "onnx", flavor=flavor).path
    done = quantize_onnx(
        source, tmp_path / "int8", Quantization(scheme="int8", smooth="none", head=True), calibration=tokens
    )
    lookups = nodes_of(done.path / "model.onnx", "GatherBlockQuantized")
    if flavor == "portable":
        assert done.record["embeddings"] == {} and not lookups
        return
    assert done.record["embeddings"] == {TABLE: f"codes of {TABLE}"} and len(lookups) == 1
    rows = session_outputs(done.path, tokens[:1, :9], [f"{TABLE}.rows"])[f"{TABLE}.rows"][0]
    table = SafetensorsWeights(checkpoint).load(f"{TABLE}.weight").numpy()[tokens[0, :9]]
    assert 0 < np.abs(rows - table).max() < 0.6 * np.abs(table).max() / 127
    require_exact_int8()
    expected, found = (OrtDecoder(folder).prefill(tokens[:2])[0] for folder in (source, done.path))
    assert np.abs(found - expected).max() < 0.2 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["t5", "flan-t5"])
def test_both_graphs_of_an_encoder_decoder_read_the_same_codes(tmp_path: Path, kind: str) -> None:
    checkpoint = write_t5(tmp_path / "t5", kind)
    source = onnx_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / "onnx").path
    done = quantize_onnx(source, tmp_path / "w4", Quantization(scheme="w4", block_size=BLOCK, head=True))
    holder = "lm_head" if kind == "t5" else "shared"
    assert done.record["embeddings"] == {"shared": f"codes of {holder}"}
    places = set()
    for file in (ENCODER_FILE, DECODER_FILE):
        (lookup,) = nodes_of(done.path / file, "GatherBlockQuantized")
        model = onnx.load(done.path / file, load_external_data=False)
        (codes,) = [t for t in model.graph.initializer if t.name == f"{holder}.weight_quantized"]
        places.add(tuple((entry.key, entry.value) for entry in codes.external_data))
        assert "shared.weight" not in {tensor.name for tensor in model.graph.initializer}
        assert lookup.input[1] == "input_ids"
    assert len(places) == 1 and dict(places.pop())["location"] == DATA_FILE
    table = SafetensorsWeights(checkpoint).load("shared.weight").numpy()
    rounded = round_weight(table.T, bits=4, block_size=BLOCK, search=True).dequantized().T
    prompt = np.arange(3, 12)[None]
    rows = encoder_values(done.path, prompt, ["shared.rows"])["shared.rows"]
    np.testing.assert_allclose(rows[0], rounded[prompt[0]], rtol=0, atol=1e-6)
    answer = greedy_tokens(OrtSeq2Seq(done.path), prompt, max_new_tokens=4, eos_token_ids=frozenset())
    assert len(answer) == 4


def test_what_stays_float(tmp_path: Path, tiny_llama: Path) -> None:
    """No head asked for, rows that are no whole blocks, and graphs that TensorRT reads too."""
    source = onnx_from_checkpoint(Checkpoint.open(tiny_llama), tmp_path / "onnx").path
    for name, options, said in (
        ("headless", {"block_size": BLOCK}, {}),
        ("blocks", {"head": True}, {TABLE: "float: rows of 48 numbers are no whole blocks of 32"}),
        ("tensorrt", {"block_size": BLOCK, "head": True, "writing": "tensorrt"}, {}),
    ):
        done = quantize_onnx(source, tmp_path / name, Quantization(scheme="w4", **options))  # type: ignore[arg-type]
        assert done.record["embeddings"] == said
        (gather,) = nodes_of(done.path / "model.onnx", "Gather")
        assert gather.input[0] == f"{TABLE}.weight"


def test_half_precision_rows(tmp_path: Path, tiny_llama: Path, tokens: NDArray[np.int64]) -> None:
    source = onnx_from_checkpoint(Checkpoint.open(tiny_llama), tmp_path / "onnx", dtype="fp16").path
    done = quantize_onnx(source, tmp_path / "w4", Quantization(scheme="w4", block_size=BLOCK, head=True))
    session = onnxruntime.InferenceSession(done.path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].type == "tensor(float16)"
    logits, _ = OrtDecoder(done.path).prefill(tokens[:1])
    assert np.isfinite(logits).all()
