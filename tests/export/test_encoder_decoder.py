"""Encoder-decoders in ONNX: equal to transformers in every form, one copy of every weight, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from builders.plans import plan_for, shape_of
from builders.tiny import VOCABULARY
from builders.tiny_t5 import write_t5
from builders.transformers_js import VERSION as JS_VERSION
from builders.transformers_js import installed_transformers_js, run_transformers_js
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.t5.modeling_t5 import T5Attention

from nirvana_deploy.base.errors import NirvanaError, VerificationError
from nirvana_deploy.export.encoder_decoder import position_buckets
from nirvana_deploy.export.footprint import footprint_of
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.quality import quality_of
from nirvana_deploy.measure.roofline.graph import work_of
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_checkpoint
from nirvana_deploy.model.weights import expected_shapes
from nirvana_deploy.output.layout import DATA_FILE, DECODER_FILE, ENCODER_FILE
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.runtime.onnxruntime.encoder_decoder import OrtSeq2Seq
from nirvana_deploy.runtime.runner import greedy_tokens
from nirvana_deploy.verify.against_torch import verify_onnx

FORMS = [f"{kind} {form}" for kind in ("t5", "flan-t5") for form in ("dense", "global", "uniform")]


def write_form(root: Path, kind: str, form: str) -> Path:
    """A checkpoint folder of a kind, dense or pruned by an allocation."""
    dense = write_t5(root / "dense", kind)
    if form == "dense":
        return dense
    slice_checkpoint(Checkpoint.open(dense), plan_for(dense, allocation=form, seed=0), root / "pruned")
    return root / "pruned"


@pytest.fixture(scope="module", params=FORMS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its ONNX folder, in every form in turn; read-only."""
    root = tmp_path_factory.mktemp("t5-onnx")
    checkpoint = write_form(root, *request.param.split())
    onnx_from_checkpoint(Checkpoint.open(checkpoint), root / "onnx")
    return checkpoint, root / "onnx"


@pytest.fixture(scope="module")
def flan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A globally pruned Flan-T5 checkpoint; read-only."""
    return write_form(tmp_path_factory.mktemp("flan"), "flan-t5", "global")


def drawn(*shape: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, size=shape)


def torch_logits(
    model: PreTrainedModel, prompt: NDArray[np.int64], mask: NDArray[np.int64], answer: NDArray[np.int64]
) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = model(
            input_ids=torch.from_numpy(prompt),
            attention_mask=torch.from_numpy(mask),
            decoder_input_ids=torch.from_numpy(answer),
        ).logits.numpy()
    return logits


def test_verification_passes_and_says_what_it_compared(pair: tuple[Path, Path]) -> None:
    report = verify_onnx(*pair, new_tokens=6, threads=1)
    report.require_passed(pair[1])
    names = [check.name for check in report.checks]
    assert names[3] == "encoder 3 x 19, padded"
    assert names[5] == "decoder 3 x 1 after 19 tokens, prompts padded, then 18 decode steps"
    ours, genai = report.greedy
    assert (ours.prompts, ours.equal_prompts) == (5, 5)
    assert genai.not_run is not None and "runs no T5" in genai.not_run


def test_logits_with_past_and_padding_equal_transformers(pair: tuple[Path, Path]) -> None:
    checkpoint, folder = pair
    model, runner = load_checkpoint(checkpoint), OrtSeq2Seq(folder, threads=1)
    prompt, answer = drawn(3, 33), drawn(3, 50, seed=1)
    mask = np.ones_like(prompt)
    mask[0, 21:], mask[1, :12] = 0, 0
    expected = torch_logits(model, prompt, mask, answer)
    state, parts = runner.encode(prompt, mask), []
    for start, end in ((0, 2), (2, 3), (3, 31), (31, 50)):  # one token, many, and a past in between
        logits, state = runner.decode(answer[:, start:end], state)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=1e-4, atol=1e-4)


def test_cross_keys_are_computed_once(pair: tuple[Path, Path]) -> None:
    runner = OrtSeq2Seq(pair[1], threads=1)
    _, first = runner.prefill(drawn(2, 9))
    _, second = runner.decode(drawn(2, 1), first)
    session = onnxruntime.InferenceSession(pair[1] / DECODER_FILE, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in zip(runner._past_names, first.cache, strict=True)}
    feeds |= {"input_ids": drawn(2, 1), "encoder_attention_mask": first.encoder_mask.numpy()}
    feeds |= {"encoder_hidden_states": first.encoder_states.numpy(), "use_cache_branch": np.array([True])}
    present = [name.replace("past_key_values", "present") for name in runner._past_names]
    caches = zip(present, first.cache, second.cache, session.run(present, feeds), strict=True)
    for name, before, after, given_back in caches:
        if ".encoder." in name:  # the graph gives back what it was given, and the runner keeps it
            np.testing.assert_array_equal(before.numpy(), given_back)
            assert after is before and given_back.shape[2] == 9
        else:
            assert (before.numpy().shape[2], after.numpy().shape[2]) == (1, 2)


@pytest.mark.consumer(
    "ONNX Runtime",
    artifact="ONNX folder of tiny T5 and Flan-T5, encoder and decoder",
    proof="greedy generation equals that of transformers",
    package="onnxruntime",
)
def test_generation_equals_transformers(pair: tuple[Path, Path]) -> None:
    checkpoint, folder = pair
    model, runner = load_checkpoint(checkpoint), OrtSeq2Seq(folder, threads=1)
    answers = []
    for seed in range(3):
        prompt = drawn(1, 6 + 5 * seed, seed=seed)
        plain = GenerationConfig(max_new_tokens=12, do_sample=False, decoder_start_token_id=0, pad_token_id=0)
        wanted = model.generate(torch.from_numpy(prompt), generation_config=plain)[0, 1:].tolist()
        answers.append(greedy_tokens(runner, prompt, max_new_tokens=12, eos_token_ids=frozenset([1])))
        assert answers[-1] == wanted
    stop, streamed = answers[0][2], []
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_ids": frozenset([stop])}
    cut = greedy_tokens(runner, drawn(1, 6, seed=0), **options, on_token=streamed.append)
    assert cut == streamed == answers[0][: answers[0].index(stop) + 1]


@pytest.mark.consumer(
    "transformers.js",
    artifact="ONNX of tiny T5 and Flan-T5: dense, global, uniform",
    proof="12 greedy tokens of a padded batch of each equal transformers'",
    version=JS_VERSION,
)
def test_transformers_js_generates_the_same(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    assert pytestconfig.cache is not None
    installed = installed_transformers_js(pytestconfig.cache)
    prompt, mask = drawn(2, 9), np.ones((2, 9), dtype=np.int64)
    mask[1, 6:] = 0
    jobs, wanted = [], []
    for form in FORMS:
        root = tmp_path / form.replace(" ", "-")
        checkpoint = write_form(root, *form.split())
        onnx_from_checkpoint(Checkpoint.open(checkpoint), root / "onnx")
        order = {"folder": str(root / "onnx"), "prompts": prompt.tolist(), "mask": mask.tolist()}
        jobs.append({**order, "new_tokens": 12})
        answers = load_checkpoint(checkpoint).generate(
            torch.from_numpy(prompt),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
        )
        wanted.append(answers.tolist())
    assert run_transformers_js(installed, jobs, tmp_path) == wanted


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(8, 16), (32, 128), (32, 100), (6, 7), (64, 1000)])
def test_buckets_are_those_of_transformers(buckets: int, max_distance: int, bidirectional: bool) -> None:
    found = position_buckets(buckets=buckets, max_distance=max_distance, bidirectional=bidirectional)
    relative = torch.arange(-3 * max_distance, 3 * max_distance + 1)
    expected = T5Attention._relative_position_bucket(relative, bidirectional, buckets, max_distance)
    clipped = relative.clamp(-max_distance, max_distance) + max_distance
    np.testing.assert_array_equal(found[clipped.numpy()], expected.numpy())


def test_every_weight_is_stored_once_and_multiplied_as_it_lies(pair: tuple[Path, Path]) -> None:
    checkpoint, folder = pair
    graphs = [
        onnx.load(folder / name, load_external_data=False).graph for name in (ENCODER_FILE, DECODER_FILE)
    ]
    stored: dict[str, set[tuple[str, ...]]] = {}
    for graph in graphs:
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = tuple(entry.value for entry in tensor.external_data)
                stored.setdefault(tensor.name, set()).add(place)
    shapes = expected_shapes(shape_of(checkpoint))
    assert stored.keys() == shapes.keys()
    assert all(len(places) == 1 for places in stored.values())
    assert {place[0] for places in stored.values() for place in places} == {DATA_FILE}
    multiplied = {node.input[1] for graph in graphs for node in graph.node if node.op_type == "MatMul"}
    gathered = ("shared.weight", "relative_attention_bias.weight")
    linears = {name for name, size in shapes.items() if len(size) == 2 and not name.endswith(gathered)}
    assert linears <= multiplied
    sizes = {tensor.name: tuple(tensor.dims) for graph in graphs for tensor in graph.initializer}
    assert all(sizes[name] == shapes[name][::-1] for name in linears)


def test_the_interface_is_that_of_optimum(pair: tuple[Path, Path]) -> None:
    checkpoint, folder = pair
    graph = onnx.load(folder / DECODER_FILE, load_external_data=False).graph
    kinds = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
    caches = [f"{layer}.{kind}" for layer in range(2) for kind in kinds]
    assert [value.name for value in graph.input] == [
        "encoder_attention_mask",
        "input_ids",
        "encoder_hidden_states",
        *(f"past_key_values.{name}" for name in caches),
        "use_cache_branch",
    ]
    assert [value.name for value in graph.output] == ["logits", *(f"present.{name}" for name in caches)]
    encoder = onnx.load(folder / ENCODER_FILE, load_external_data=False).graph
    assert [value.name for value in encoder.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in encoder.output] == ["last_hidden_state"]
    written = config_json(folder)
    assert written["architectures"] == ["T5ForConditionalGeneration"] and "auto_map" not in written
    assert (folder / "generation_config.json").is_file()
    assert not (folder / "genai_config.json").exists()
    heads = [layer.kv_heads for layer in shape_of(checkpoint).layers if layer.site == "cross"]
    sizes = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    assert [sizes[f"past_key_values.{layer}.encoder.key"][1].dim_value for layer in range(2)] == heads


def test_a_past_that_is_not_declared_is_refused_not_attended(pair: tuple[Path, Path]) -> None:
    session = onnxruntime.InferenceSession(pair[1] / DECODER_FILE, providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {
        "encoder_attention_mask": np.ones((1, 4), dtype=np.int64),
        "input_ids": np.zeros((1, 1), dtype=np.int64),
        "encoder_hidden_states": np.zeros((1, 4, 48), dtype=np.float32),
        "use_cache_branch": np.array([False]),
    }
    for node in session.get_inputs():
        if node.name.startswith("past"):
            feeds[node.name] = np.zeros((1, node.shape[1], 1, node.shape[3]), dtype=np.float32)
    with pytest.raises(Exception, match="inconsistent total_sequence_length"):
        session.run(None, feeds)


def test_a_narrow_failure_is_judged_in_float64(pair: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, folder = pair
    strictly: dict[str, Any] = {"new_tokens": 2, "threads": 1, "relative_tolerance": 1e-8, "narrowly": 1e4}
    report = verify_onnx(checkpoint, folder, **strictly)
    assert all(check.passed and check.name.startswith("in float64: ") for check in report.checks), report
    assert all(check.tolerance < 1e-3 for check in report.checks)  # a multiple of float32's own distance

    shutil.copytree(checkpoint, tmp_path / "other")
    tensors = load_file(checkpoint / "model.safetensors")
    for name in ("encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"):
        tensors[name] *= 1.00008
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    report = verify_onnx(tmp_path / "other", folder, **strictly)
    assert not any(check.passed for check in report.checks), report


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_keeps_wide_what_overflows(flan: Path, tmp_path: Path, dtype: str) -> None:
    onnx_from_checkpoint(Checkpoint.open(flan), tmp_path / "onnx", dtype=dtype)
    onnx.checker.check_model(tmp_path / "onnx" / DECODER_FILE, full_check=True)
    report = verify_onnx(flan, tmp_path / "onnx", new_tokens=4, threads=1)
    report.require_passed(tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / DECODER_FILE, load_external_data=False).graph
    half = onnx.TensorProto.FLOAT16 if dtype == "fp16" else onnx.TensorProto.BFLOAT16
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert types["decoder.block.0.layer.0.SelfAttention.q.weight"] == half
    wo = types["decoder.block.0.layer.2.DenseReluDense.wo.weight"]
    assert wo == (onnx.TensorProto.FLOAT if dtype == "fp16" else half)
    assert types["decoder.final_layer_norm.weight"] == onnx.TensorProto.FLOAT
    assert {value.type.tensor_type.elem_type for value in graph.output} == {half}


def test_sums_beyond_float16_stay_finite(tmp_path: Path) -> None:
    folder = write_t5(tmp_path / "t5", "t5")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("wo.weight"):
            tensors[name] *= 60_000.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    onnx_from_checkpoint(Checkpoint.open(folder), tmp_path / "onnx", dtype="fp16")
    prompt, answer = drawn(2, 9), drawn(2, 4, seed=1)
    runner = OrtSeq2Seq(tmp_path / "onnx", threads=1)
    logits, _ = runner.decode(answer, runner.encode(prompt))
    expected = torch_logits(load_checkpoint(folder), prompt, np.ones_like(prompt), answer)
    assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flavor": "gqa"}, r"encoder-decoder \(t5\) cannot be exported with the flavor gqa"),
        ({"flavor": "static-cache", "cache_tokens": 64}, "with the flavor static-cache"),
        ({"last_logits": True}, "with last logits only"),
    ],
)
def test_what_an_encoder_decoder_has_not_is_refused(
    flan: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(NirvanaError, match=message):
        onnx_from_checkpoint(Checkpoint.open(flan), tmp_path / "onnx", **options)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-mish"}, "gated-mish"),
        ({"relative_attention_max_distance": 4}, "leaves no room for 8"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = write_t5(tmp_path / "t5", "flan-t5")
    config = config_json(folder) | change
    config.pop("dense_act_fn", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NirvanaError, match=message):
        onnx_from_checkpoint(Checkpoint.open(folder), tmp_path / "onnx")


@pytest.fixture
def copied(flan: Path, tmp_path: Path) -> Path:
    """An ONNX folder of ``flan`` that a test may damage."""
    onnx_from_checkpoint(Checkpoint.open(flan), tmp_path / "onnx")
    return tmp_path / "onnx"


@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("encoder.block.1.layer.0.SelfAttention.o.weight", "encoder layer 1"),
        ("decoder.block.0.layer.1.EncDecAttention.v.weight", "decoder layer 0"),
        ("decoder.block.1.layer.2.DenseReluDense.wo.weight", "decoder layer 1"),
        ("lm_head.weight", "final norm or head"),
    ],
)
def test_the_first_departure_is_named(flan: Path, copied: Path, weight: str, place: str) -> None:
    damage(copied, weight)
    report = verify_onnx(flan, copied, new_tokens=2, threads=1)
    assert report.first_departure == place
    with pytest.raises(VerificationError, match=f"first departure is at: {place}"):
        report.require_passed(copied)


def damage(folder: Path, weight: str) -> None:
    """Write other numbers over one tensor of the external data."""
    for file in (ENCODER_FILE, DECODER_FILE):
        for tensor in onnx.load(folder / file, load_external_data=False).graph.initializer:
            if tensor.name == weight:
                place = {entry.key: entry.value for entry in tensor.external_data}
                count = int(place["length"]) // 4
                with (folder / DATA_FILE).open("r+b") as data:
                    data.seek(int(place.get("offset", 0)))
                    data.write(np.linspace(-1, 1, count, dtype=np.float32).tobytes())


@pytest.mark.parametrize("missing", [DECODER_FILE, DATA_FILE, "config.json"])
def test_a_folder_with_a_file_missing_says_which(copied: Path, missing: str) -> None:
    (copied / missing).unlink()
    with pytest.raises(NirvanaError, match=missing):
        OrtSeq2Seq(copied)


def test_quality_is_that_of_teacher_forcing(flan: Path, copied: Path) -> None:
    windows, model = drawn(2, 15), load_checkpoint(flan)
    found = quality_of(OrtSeq2Seq(copied, threads=1), {}, windows)["dense"]
    start = np.zeros((2, 1), dtype=np.int64)
    answer = np.concatenate([start, windows[:, 7:]], axis=1)
    logits = torch_logits(model, windows[:, :7], np.ones((2, 7), dtype=np.int64), answer)[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).flatten(0, 1), torch.from_numpy(windows[:, 7:]).flatten()
    )
    assert found["tokens"] == 2 * 8
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def counted_parameters(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            yield name, module.weight.numel()


def test_bounds_count_what_an_encoder_decoder_reads(pair: tuple[Path, Path]) -> None:
    checkpoint, folder = pair
    shape = shape_of(checkpoint)
    work = work_of(folder, linear_parameters=shape.linear_parameters)
    linears = dict(counted_parameters(load_checkpoint(checkpoint)))
    once = (".EncDecAttention.k", ".EncDecAttention.v")
    per_step = sum(
        count for name, count in linears.items() if name.startswith("decoder.") and not name.endswith(once)
    )
    assert work.linear_parameters == sum(linears.values())
    assert sum(one.weights for one in work.products if one.rows == "new") == per_step + VOCABULARY * 48
    weights = 4 * (per_step + VOCABULARY * 48)
    beside = footprint_of(folder).weight_bytes_per_step - weights  # norms and the like
    assert 0 < beside < 3_000
    own, cross = (
        sum(layer.kv_heads for layer in shape.layers if layer.site == site) for site in ("decoder", "cross")
    )
    assert work.kv_cache_bytes_per_token == shape.kv_cache_bytes_per_token(4) == 2 * own * 8 * 4
    step = work.mean_decode(prompt_tokens=100, new_tokens=6, batch_size=3).read_bytes
    caches = np.mean([2, 3, 4, 5, 6]) * 2 * own * 8 * 4 + 100 * 2 * cross * 8 * 4
    assert step == weights + beside + 3 * caches
    prefill = work.prefill(prompt_tokens=10)
    read = sum(linears.values()) - per_step
    encoder = onnx.load(folder / "encoder_model.onnx", load_external_data=False).graph
    constants = sum(4 * np.prod(one.dims) for one in encoder.initializer if one.name.endswith("norm.weight"))
    assert prefill.weight_bytes >= weights + beside + 4 * read + constants
    heads = sum(layer.kv_heads for layer in shape.layers if layer.site == "encoder")
    attention = 2 * 2 * 8 * (heads * 10 * 10 + cross * 10 + own)  # the start token sees itself
    assert prefill.operations["float32"] == 2 * 10 * read + 2 * (per_step + VOCABULARY * 48) + attention


def test_tensors_in_the_data_file_are_the_checkpoints(flan: Path, copied: Path) -> None:
    model = onnx.load(copied / DECODER_FILE)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, tensor in load_file(flan / "model.safetensors").items():
        if name.startswith("decoder.") and name in tensors:
            wanted = tensor.numpy()
            turned = wanted.ndim == 2 and "relative_attention_bias" not in name
            np.testing.assert_array_equal(tensors[name], wanted.T if turned else wanted)


def test_a_graph_of_another_cut_is_refused(flan: Path, copied: Path, tmp_path: Path) -> None:
    dense = write_t5(tmp_path / "dense", "flan-t5")
    with pytest.raises(NirvanaError, match=r"past_key_values\.\d\.(decoder|encoder)\.key holds \d KV heads"):
        verify_onnx(dense, copied, threads=1)
