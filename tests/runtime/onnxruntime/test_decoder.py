from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from builders.tiny_decoder import HEAD_DIM, KV_HEADS, VOCAB, numpy_logits, tiny_weights, write_tiny_decoder

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.machine import default_threads
from nirvana_deploy.runtime.onnxruntime import session as ort_session
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.runner import greedy_tokens

PROMPT = np.array([3, 1, 4, 1, 5, 9, 2], dtype=np.int64)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_decoder(tmp_path_factory.mktemp("tiny") / "onnx")


@pytest.fixture(scope="module")
def decoder(folder: Path) -> OrtDecoder:
    return OrtDecoder(folder, threads=1)


def test_dimensions_are_read_from_the_session(decoder: OrtDecoder) -> None:
    assert decoder.kv_heads == KV_HEADS
    assert (decoder.head_dim, decoder.vocab_size) == (HEAD_DIM, VOCAB)
    assert (decoder.runtime, decoder.threads) == ("onnxruntime-cpu", 1)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_prefill_logits_equal_numpy(decoder: OrtDecoder, count: int) -> None:
    logits, _ = decoder.prefill(PROMPT[None, :count])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[0], numpy_logits(tiny_weights(), PROMPT[:count]), **CLOSE)


def test_decode_continues_the_prefill(decoder: OrtDecoder) -> None:
    expected = numpy_logits(tiny_weights(), PROMPT)
    _, state = decoder.prefill(PROMPT[None, :4])
    for position in range(4, len(PROMPT)):
        logits, state = decoder.decode(PROMPT[None, position : position + 1], state)
        np.testing.assert_allclose(logits[0, 0], expected[position], **CLOSE)
    assert state.attention_mask.shape == (1, len(PROMPT))
    assert [value.shape() for value in state.cache[::2]] == [[1, heads, 7, HEAD_DIM] for heads in KV_HEADS]


def test_left_padded_batch_equals_each_prompt_alone(decoder: OrtDecoder) -> None:
    short = PROMPT[:3]
    tokens = np.stack([PROMPT, np.concatenate([np.zeros(4, dtype=np.int64), short])])
    mask = np.array([[1] * 7, [0] * 4 + [1] * 3], dtype=np.int64)
    logits, state = decoder.prefill(tokens, mask)
    np.testing.assert_allclose(logits[0], numpy_logits(tiny_weights(), PROMPT), **CLOSE)
    np.testing.assert_allclose(logits[1, 4:], numpy_logits(tiny_weights(), short), **CLOSE)
    logits, _ = decoder.decode(np.array([[6], [8]], dtype=np.int64), state)
    np.testing.assert_allclose(logits[0, 0], numpy_logits(tiny_weights(), np.append(PROMPT, 6))[-1], **CLOSE)
    np.testing.assert_allclose(logits[1, 0], numpy_logits(tiny_weights(), np.append(short, 8))[-1], **CLOSE)


def test_a_state_can_be_continued_twice(decoder: OrtDecoder) -> None:
    _, state = decoder.prefill(PROMPT[None])
    first, _ = decoder.decode(np.array([[2]], dtype=np.int64), state)
    kept = first.copy()
    decoder.decode(np.array([[7]], dtype=np.int64), state)
    again, _ = decoder.decode(np.array([[2]], dtype=np.int64), state)
    np.testing.assert_array_equal(again, kept)
    np.testing.assert_array_equal(first, kept)  # a later step does not write over returned logits


def test_generate_is_greedy(decoder: OrtDecoder) -> None:
    expected = list(PROMPT)
    for _ in range(5):
        expected.append(int(numpy_logits(tiny_weights(), np.array(expected))[-1].argmax()))
    heard: list[int] = []
    new_ids = greedy_tokens(decoder, PROMPT[None], max_new_tokens=5, on_token=heard.append)
    assert new_ids == heard == expected[len(PROMPT) :]


def test_generate_stops_after_a_stop_token(decoder: OrtDecoder) -> None:
    new_ids = greedy_tokens(decoder, PROMPT[None], max_new_tokens=5)
    stop = new_ids[2]
    until = new_ids.index(stop) + 1
    stopped = greedy_tokens(decoder, PROMPT[None], max_new_tokens=5, eos_token_ids=frozenset({stop}))
    assert stopped == new_ids[:until]
    assert greedy_tokens(decoder, PROMPT[None], max_new_tokens=0) == []


def test_threads_default_to_usable_physical_cores(folder: Path) -> None:
    assert OrtDecoder(folder).threads == default_threads() >= 1
    with pytest.raises(NirvanaError, match="threads must be at least 1, got 0"):
        OrtDecoder(folder, threads=0)


@pytest.mark.parametrize("shape", [(0, 3), (1, 0), (3,)])
def test_an_empty_prompt_is_refused(decoder: OrtDecoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(NirvanaError, match="at least one token"):
        decoder.prefill(np.zeros(shape, dtype=np.int64))


def test_a_folder_without_a_model_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"holds no model\.onnx\.\n.*nirvana-deploy export"):
        OrtDecoder(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder = write_tiny_decoder(tmp_path)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(NirvanaError, match=r"model\.onnx\.data is missing"):
        OrtDecoder(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    path = write_tiny_decoder(tmp_path) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(NirvanaError, match=r"cannot be loaded: .*\n.*nirvana-deploy export"):
        OrtDecoder(tmp_path)


def test_symbolic_kv_heads_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_decoder(tmp_path, static_heads=False)
    with pytest.raises(NirvanaError, match=r"past_key_values\.0\.key' must be static, got"):
        OrtDecoder(folder)


def test_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negate", [x], [y])
    opset = [helper.make_opsetid("", 23)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(NirvanaError, match="not a decoder with a KV cache: its inputs are x,"):
        OrtDecoder(tmp_path)


def test_an_unknown_provider_is_refused(folder: Path) -> None:
    with pytest.raises(NirvanaError, match=r"no 'NoSuchExecutionProvider'; it has .*CPUExecutionProvider"):
        OrtDecoder(folder, provider="NoSuchExecutionProvider")


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    spec = importlib.util.spec_from_file_location("ort_without_onnxruntime", ort_session.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(MissingExtraError, match=r"pip install .*\[cpu\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
