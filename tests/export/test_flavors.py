"""Every flavor and dtype of the decoder's graph computes what the checkpoint computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from builders.damaged import damaged_copy
from builders.extras import needs
from builders.jobs import SHORT
from builders.plans import plan_for
from builders.tiny import KINDS, write_tiny
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nirvana_deploy import prune_export
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export import streaming
from nirvana_deploy.export.decoder import FLAVORS
from nirvana_deploy.export.dtypes import DTYPES
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.export.packed import unpacked_names
from nirvana_deploy.model.checkpoint import Checkpoint, load_checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.runner import greedy_tokens
from nirvana_deploy.runtime.torch import TorchDecoder
from nirvana_deploy.verify.against_torch import logits_checks, verify_onnx
from nirvana_deploy.verify.tolerance import RELATIVE_TOLERANCE, relative_tolerance

HEAD_DIM = 16  # GroupQueryAttention takes multiples of it
CACHE_TOKENS = 64
STOP = frozenset({2})
PROMPTS = np.random.default_rng(17).integers(3, 272, size=(3, 9))
PADDED = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1], [1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]], dtype=np.int64)


def exported(checkpoint: Path, out: Path, flavor: str, **options: object) -> Path:
    if flavor == "static-cache":
        options.setdefault("cache_tokens", CACHE_TOKENS)
    return onnx_from_checkpoint(Checkpoint.open(checkpoint), out, flavor=flavor, **options).path  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=list(KINDS))
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("dense") / request.param, request.param, head_dim=HEAD_DIM)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with norms of heads, whose layers differ; read-only."""
    folder = tmp_path_factory.mktemp("qwen3")
    slice_checkpoint(
        Checkpoint.open(write_tiny(folder / "dense", "qwen3")), plan_for(folder / "dense"), folder / "pruned"
    )
    return folder / "pruned"


@pytest.fixture(scope="module", params=FLAVORS)
def folder(request: pytest.FixtureRequest, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX folder of each flavor of it."""
    return exported(qwen3, tmp_path_factory.mktemp("flavor") / request.param, request.param)


@pytest.mark.parametrize("allocation", ["dense", "global", "uniform"])
def test_every_flavor_equals_torch(dense: Path, tmp_path: Path, allocation: str) -> None:
    checkpoint = dense
    if allocation != "dense":
        checkpoint = tmp_path / "checkpoint"
        slice_checkpoint(Checkpoint.open(dense), plan_for(dense, allocation=allocation), checkpoint)
    model = load_checkpoint(checkpoint)
    for flavor in FLAVORS:
        decoder = OrtDecoder(exported(checkpoint, tmp_path / flavor, flavor), threads=1)
        checks = logits_checks(TorchDecoder(model), decoder, RELATIVE_TOLERANCE)
        assert len(checks) == 5 and all(check.passed for check in checks), (flavor, checks)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_half_precision_is_verified(qwen3: Path, tmp_path: Path, flavor: str) -> None:
    report = verify_onnx(
        qwen3, exported(qwen3, tmp_path / "16", flavor, dtype="fp16"), new_tokens=4, threads=1
    )
    assert report.passed, report
    exact, rounded = report.checks[:5], report.checks[5:]
    assert len(exact) == len(rounded) == 5
    assert all(check.name.startswith("in float32: ") for check in exact)
    for close, loose in zip(exact, rounded, strict=True):
        assert close.tolerance < loose.tolerance and close.max_abs_diff < loose.max_abs_diff

    report = verify_onnx(
        qwen3, exported(qwen3, tmp_path / "b16", flavor, dtype="bf16"), new_tokens=4, threads=1
    )
    assert report.passed, report
    assert all(check.name.startswith("in float32: ") for check in report.checks)
    assert [check.runtime for check in report.greedy] == ["onnxruntime (in float32)", "onnxruntime-genai"]
    assert report.greedy[1].not_run is not None and "bfloat16" in report.greedy[1].not_run


def test_a_wrong_weight_is_found_in_half_precision(qwen3: Path, tmp_path: Path) -> None:
    right = exported(qwen3, tmp_path / "right", "portable", dtype="fp16")
    wrong = damaged_copy(right, tmp_path / "wrong", "model.layers.1.self_attn.v_proj.weight")
    report = verify_onnx(qwen3, wrong, new_tokens=2, threads=1)
    assert not report.passed and report.first_departure == "layer 1"


def test_the_tolerance_follows_the_dtype() -> None:
    fp16, bf16 = (relative_tolerance(DTYPES[name], layers=30) for name in ("fp16", "bf16"))
    assert fp16 == pytest.approx(4 * 2**-11 * 420**0.5) and bf16 == 8 * fp16
    assert relative_tolerance(DTYPES["fp32"], layers=30) == RELATIVE_TOLERANCE


def test_a_narrow_failure_is_judged_in_float64(qwen3: Path, tmp_path: Path) -> None:
    model = load_checkpoint(qwen3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    right = exported(qwen3, tmp_path / "right", "portable")
    checks = logits_checks(TorchDecoder(model), OrtDecoder(right, threads=1), 1e-8, narrowly=1e4)
    assert all(check.passed and check.name.startswith("in float64: ") for check in checks), checks
    assert all(check.tolerance < 1e-4 for check in checks)  # a multiple of float32's own distance
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])

    largest = load_file(qwen3 / "model.safetensors")["lm_head.weight"].abs().max()
    other = scaled_copy(qwen3, tmp_path / "other", "lm_head.weight", 1.00002 * float(largest))
    wrong = OrtDecoder(exported(other, tmp_path / "wrong", "portable"), threads=1)
    checks = logits_checks(TorchDecoder(model), wrong, 1e-8, narrowly=1e4)
    assert not any(check.passed for check in checks), checks
    checks = logits_checks(TorchDecoder(model), wrong, 1e-8, narrowly=10)
    assert not any(check.name.startswith("in float64") for check in checks)


def scaled_copy(checkpoint: Path, out: Path, name: str, largest: float) -> Path:
    """The checkpoint with one tensor scaled so that its largest value is ``largest``."""
    out.mkdir()
    for file in checkpoint.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    tensors[name] *= largest / tensors[name].abs().max()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_weights_beyond_float16_are_named(qwen3: Path, tmp_path: Path) -> None:
    checkpoint = scaled_copy(qwen3, tmp_path / "big", "model.layers.1.mlp.up_proj.weight", 7e4)
    with pytest.raises(NirvanaError, match=r"layers\.1\.mlp\.up_proj\.weight' holds 7e\+04.*\n.*bf16"):
        onnx_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / "onnx", dtype="fp16")
    assert not (tmp_path / "onnx").exists()
    onnx_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / "onnx", dtype="bf16")


def test_norms_survive_squares_beyond_float16(qwen3: Path, tmp_path: Path) -> None:
    """A hidden state of 2000 has squares of 4 million, where float16 ends at 65504."""
    checkpoint = scaled_copy(qwen3, tmp_path / "big", "model.embed_tokens.weight", 2000.0)
    folder = exported(checkpoint, tmp_path / "onnx", "gqa", dtype="fp16")
    assert verify_onnx(checkpoint, folder, new_tokens=4, threads=1).passed


@pytest.mark.parametrize("operator", ["Attention", "GroupQueryAttention"])
def test_the_softmax_counts_beyond_float16(operator: str) -> None:
    """Of 6000 equal keys each weighs 1/6000; a sum in float16 would stop at 2048 and give values of 2.9."""
    S, half = 6000, onnx.TensorProto.FLOAT16
    past, one = np.ones((1, 2, S - 1, 16), dtype=np.float16), np.ones((1, 1, 32), dtype=np.float16)
    if operator == "Attention":
        feeds = {"q": np.zeros((1, 2, 1, 16), dtype=np.float16), "k": 0 * past, "v": past}
        node = onnx.helper.make_node(operator, list("qkv"), ["y"])
    else:
        feeds = {"q": 0 * one, "v": one, "past_k": 0 * past, "past_v": past}
        lengths = {"last": np.array([S - 1], dtype=np.int32), "total": np.array(S, dtype=np.int32)}
        node = onnx.helper.make_node(
            operator,
            ["q", "q", "v", "past_k", "past_v", *lengths],
            ["y", "k", "w"],
            domain="com.microsoft",
            num_heads=2,
            kv_num_heads=2,
        )
        feeds |= lengths  # type: ignore[arg-type]
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, half if array.dtype == np.float16 else onnx.TensorProto.INT32, array.shape
        )
        for name, array in feeds.items()
    ]
    graph = onnx.helper.make_graph(
        [node], "one", inputs, [onnx.helper.make_tensor_value_info("y", half, feeds["q"].shape)]
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["y"], feeds)[0], 1.0, atol=2**-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_written_in_blocks_are_the_weights(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    exported(qwen3, tmp_path / "whole", "gqa", dtype=dtype)
    monkeypatch.setattr(streaming, "_BLOCK_ELEMENTS", 100)
    exported(qwen3, tmp_path / "blocks", "gqa", dtype=dtype)
    whole, blocks = ((tmp_path / name / "model.onnx.data").read_bytes() for name in ("whole", "blocks"))
    assert whole == blocks


def test_linears_keep_their_contract(folder: Path, qwen3: Path) -> None:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    readers = {name: node.op_type for node in graph.node for name in node.input if name in stored}
    weights = load_file(qwen3 / "model.safetensors")
    modules = [name.removesuffix(".weight") for name in weights if "_proj" in name or "lm_head" in name]
    assert len(modules) == 22
    if folder.name == "gqa":  # q, k, v and gate, up are one product each
        names = (name.removesuffix(".weight") for name in stored if "_proj" in name or "lm_head" in name)
        products = {name: unpacked_names(name) for name in names}
        assert Counter(map(len, products.values())) == {3: 3, 2: 3, 1: 7}
    else:
        products = {name: (name,) for name in modules}
    assert sorted(name for names in products.values() for name in names) == sorted(modules)
    for product, names in products.items():
        sizes = [weights[f"{name}.weight"].shape for name in names]
        assert stored[f"{product}.weight"] == (sizes[0][1], sum(size[0] for size in sizes))
        assert readers[f"{product}.weight"] == "MatMul"


def padded_oracle(checkpoint: Path, steps: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    """Last logits of each of PROMPTS alone, without its padding, after it and after every further token."""
    model, rows = load_checkpoint(checkpoint), []
    for prompt, mask, more in zip(PROMPTS, PADDED, steps, strict=True):
        tokens = np.concatenate([prompt[mask.astype(bool)], more])
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens[None])).logits[0].numpy()
        rows.append(logits[int(mask.sum()) - 1 :])
    return rows


def test_a_left_padded_batch_is_each_prompt_alone(folder: Path, qwen3: Path) -> None:
    steps = np.random.default_rng(2).integers(3, 272, size=(3, 4))
    decoder = OrtDecoder(folder, threads=1)
    logits, state = decoder.prefill(PROMPTS, PADDED)
    found = [logits[:, -1:]]
    for step in range(4):
        logits, state = decoder.decode(steps[:, step : step + 1], state)
        found.append(logits)
    for row, expected in enumerate(padded_oracle(qwen3, steps)):
        np.testing.assert_allclose(np.concatenate(found, axis=1)[row], expected, rtol=0, atol=1e-4)


def test_group_query_attention_itself_pads_on_the_right(qwen3: Path, tmp_path: Path) -> None:
    """Why the runner moves rows: the operator, given padding on the left, computes something else."""
    folder = exported(qwen3, tmp_path / "gqa", "gqa")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": PROMPTS, "attention_mask": PADDED}
    for node in session.get_inputs()[2:]:
        feeds[node.name] = np.zeros((3, node.shape[1], 0, node.shape[3]), dtype=np.float32)
    last = session.run(["logits"], feeds)[0][:, -1]
    right = np.array([row[0] for row in padded_oracle(qwen3, np.zeros((3, 0), dtype=np.int64))])
    np.testing.assert_allclose(last[1], right[1], rtol=0, atol=1e-4)  # the row without padding
    assert np.abs(last[0] - right[0]).max() > 0.1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the genai bindings while they load
def test_last_logits_are_enough_for_genai(qwen3: Path, tmp_path: Path) -> None:
    folder = exported(qwen3, tmp_path / "onnx", "gqa", last_logits=True)
    report = verify_onnx(qwen3, folder, new_tokens=4, threads=1)
    assert report.passed and report.greedy[1].not_run is None


def test_last_logits_are_the_last_of_all(folder: Path, qwen3: Path, tmp_path: Path) -> None:
    short = OrtDecoder(exported(qwen3, tmp_path / "last", folder.name, last_logits=True), threads=1)
    last, state = short.prefill(PROMPTS)
    whole, _ = OrtDecoder(folder, threads=1).prefill(PROMPTS)
    assert last.shape == (3, 1, 272)
    np.testing.assert_allclose(last, whole[:, -1:], rtol=0, atol=1e-5)
    short.decode(PROMPTS[:, :1], state)
    if short.in_place:
        with pytest.raises(NirvanaError, match=r"last position only.*\n.*without --last-logits"):
            short.prefill(PROMPTS, PADDED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the genai bindings while they load
@pytest.mark.parametrize("flavor", ["portable", "gqa"])
def test_a_batch_in_genai_is_each_prompt_alone(qwen3: Path, tmp_path: Path, flavor: str) -> None:
    """onnxruntime-genai pads the shorter prompt on the right, and says so in the attention mask."""
    og = needs("onnxruntime_genai")

    folder = exported(qwen3, tmp_path / "onnx", flavor)
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    texts = ["ab", "abcdefgh"]
    prompts = np.asarray(tokenizer.encode_batch(texts).as_numpy())
    assert prompts.shape == (2, 8) and not prompts[0, 2:].any()
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=14, do_sample=False, batch_size=2)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompts)
    while not generator.is_done():
        generator.generate_next_token()
    decoder = OrtDecoder(folder, threads=1)
    for row, text in enumerate(texts):
        alone = greedy_tokens(
            decoder, np.array([tokenizer.encode(text)]), max_new_tokens=6, eos_token_ids=STOP
        )
        assert list(generator.get_sequence(row)[8 : 8 + len(alone)]) == alone


@pytest.mark.parametrize("flavor", ["gqa", "static-cache"])
def test_the_cache_stays_where_it_is(qwen3: Path, tmp_path: Path, flavor: str) -> None:
    decoder = OrtDecoder(exported(qwen3, tmp_path / "onnx", flavor), threads=1)
    _, first = decoder.prefill(PROMPTS)
    addresses = [value.data_ptr() for value in first.cache]
    kept, second = decoder.decode(PROMPTS[:, :1], first)
    assert [value.data_ptr() for value in second.cache] == addresses
    before = kept.copy()
    decoder.decode(PROMPTS[:, :1], second)
    np.testing.assert_array_equal(kept, before)  # a later step does not write over returned logits
    other, _ = decoder.decode(PROMPTS[:, 1:2], first)  # an earlier state can be continued,
    assert np.abs(other - kept).max() > 0.1
    with pytest.raises(NirvanaError, match=r"was written over.*\n.*prefill again"):
        decoder.decode(PROMPTS[:, :1], second)  # and voids those after it


def test_a_shared_buffer_grows(qwen3: Path, tmp_path: Path) -> None:
    grown = OrtDecoder(exported(qwen3, tmp_path / "gqa", "gqa"), threads=1, headroom_tokens=2)
    plain = OrtDecoder(exported(qwen3, tmp_path / "portable", "portable"), threads=1)
    answers = [greedy_tokens(one, PROMPTS[:1], max_new_tokens=20) for one in (grown, plain)]
    assert answers[0] == answers[1]


def test_a_full_cache_says_so(qwen3: Path, tmp_path: Path) -> None:
    decoder = OrtDecoder(exported(qwen3, tmp_path / "onnx", "static-cache", cache_tokens=12), threads=1)
    assert decoder.max_tokens == 12
    assert len(greedy_tokens(decoder, PROMPTS[:1], max_new_tokens=4)) == 4
    with pytest.raises(NirvanaError, match=r"holds 12 tokens, and 13 are needed.\n.*--cache-length"):
        greedy_tokens(decoder, PROMPTS[:1], max_new_tokens=5)
    with pytest.raises(NirvanaError, match=r"cache of 12 tokens; verifying needs 64"):
        verify_onnx(qwen3, tmp_path / "onnx")


def test_padding_inside_a_prompt_is_refused(qwen3: Path, tmp_path: Path) -> None:
    decoder = OrtDecoder(exported(qwen3, tmp_path / "onnx", "gqa"), threads=1)
    with pytest.raises(NirvanaError, match="0 for padding on the left"):
        decoder.prefill(PROMPTS, PADDED[:, ::-1])


def test_options_that_do_not_fit_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"dtype": "fp8"}, "Unknown dtype 'fp8'; there are fp32, fp16, bf16"),
        ({"flavor": "paged"}, "Unknown flavor 'paged'; there are portable, gqa, static-cache"),
        ({"flavor": "static-cache"}, "needs the length of its cache"),
        ({"cache_tokens": 5}, "the cache of portable grows"),
        ({"flavor": "gqa"}, r"multiple of 16 numbers, and head_dim is 8.\nExport with --flavor portable"),
    ):
        with pytest.raises(NirvanaError, match=words):
            onnx_from_checkpoint(Checkpoint.open(tiny_llama), tmp_path / "onnx", **options)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the genai bindings while they load
def test_the_whole_job_in_another_dtype_and_flavor(tmp_path: Path) -> None:
    model = str(write_tiny(tmp_path / "model", "llama-tied", head_dim=HEAD_DIM))
    calib = tmp_path / "text.txt"
    calib.write_text("The quick brown fox jumps over the lazy dog. " * 300, encoding="utf-8")
    job = {
        "sparsity": 0.3,
        "out": tmp_path / "out",
        "calib": str(calib),
        "seq_len": 16,
        "num_sequences": 2,
        **SHORT,
    }
    done = prune_export(model, dtype="fp16", flavor="gqa", run_benchmark=False, **job)
    for stage in ("onnx", "dense-onnx"):
        result = done.manifest["stages"][stage]["result"]
        assert (result["dtype"], result["flavor"]) == ("fp16", "gqa")
    assert done.manifest["stages"]["verify"]["result"]["pruned"]["passed"]
    with pytest.raises(NirvanaError, match="cannot be resumed: it was made with dtype 'fp16', not 'bf16'"):
        prune_export(model, dtype="bf16", flavor="gqa", run_benchmark=False, resume=True, **job)
