"""The Triton repository: its configurations by Triton's own schema, its decode model by executing it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders.fake_triton import (
    FakeRequest,
    FakeSender,
    arguments,
    ask,
    load,
    model_config_pb2,
    parsed,
    pretend_triton,
)
from builders.plans import plan_for
from builders.tiny import write_tiny
from click.testing import CliRunner

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.cli.package import package
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, load_tokenizer
from nirvana_deploy.package.stage import package_triton
from nirvana_deploy.package.triton import TritonModel, TritonTensor, triton_from_onnx, write_repository
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.runner import greedy_tokens

TEXT = "Whatever it says, it says it"


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX folder of a globally pruned Llama."""
    folder = tmp_path_factory.mktemp("triton")
    dense = write_tiny(folder / "dense", "llama-tied")
    (dense / "chat_template.jinja").write_text("{{ '<s>' + messages[0]['content'] + ': ' }}")
    slice_checkpoint(Checkpoint.open(dense), plan_for(dense), folder / "checkpoint")
    onnx_from_checkpoint(Checkpoint.open(folder / "checkpoint"), folder / "onnx")
    return folder / "onnx"


@pytest.fixture(scope="module")
def repository(onnx_folder: Path) -> Path:
    return triton_from_onnx(onnx_folder, onnx_folder.parent / "repository", name="tiny").path


def test_the_graph_is_described_as_the_file_is(repository: Path, onnx_folder: Path) -> None:
    config = parsed(repository, "tiny-graph")
    assert (config.name, config.backend, config.max_batch_size) == ("tiny-graph", "onnxruntime", 0)
    graph = onnx.load(repository / "tiny-graph/1/model.onnx/model.onnx", load_external_data=False).graph
    types = {"TYPE_INT64": onnx.TensorProto.INT64, "TYPE_FP32": onnx.TensorProto.FLOAT}
    for told, values in ((config.input, graph.input), (config.output, graph.output)):
        assert [tensor.name for tensor in told] == [value.name for value in values]
        for tensor, value in zip(told, values, strict=True):
            tensor_type = value.type.tensor_type
            assert types[model_config_pb2.DataType.Name(tensor.data_type)] == tensor_type.elem_type
            assert list(tensor.dims) == [dim.dim_value or -1 for dim in tensor_type.shape.dim]
    heads = {tensor.dims[1] for tensor in config.input if tensor.name.endswith(".key")}
    assert len(heads) > 1  # layers differ, and the configuration says so


def test_the_placed_graph_runs_where_it_lies(repository: Path, onnx_folder: Path) -> None:
    tokens = np.array([[5, 6, 7]])
    placed, _ = OrtDecoder(repository / "tiny-graph/1/model.onnx", threads=1).prefill(tokens)
    original, _ = OrtDecoder(onnx_folder, threads=1).prefill(tokens)
    np.testing.assert_array_equal(placed, original)


@pytest.fixture
def model(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """model.py of the repository, initialized as Triton's Python backend does it."""
    config = parsed(repository, "tiny")
    pretend_triton(monkeypatch, config)
    made = load(repository / "tiny/1/model.py").TritonPythonModel()
    made.initialize(arguments(repository, config))
    yield made
    made.finalize()


@pytest.mark.consumer(
    "Triton's configuration schema and Python backend",
    artifact="model repository, global",
    proof="config.pbtxt parses by tritonclient's schema; model.py, run with onnxruntime-genai and a stand-in "
    "for Triton's utilities, streams the greedy tokens of the ONNX folder; no Triton server was run",
    package="tritonclient",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the genai bindings while they load
def test_the_decode_model_says_what_the_onnx_folder_says(model: Any, onnx_folder: Path) -> None:
    tokenizer = load_tokenizer(onnx_folder.parent / "checkpoint")
    prompt = np.array([tokenizer(TEXT)["input_ids"]])
    want = greedy_tokens(
        OrtDecoder(onnx_folder, threads=1), prompt, max_new_tokens=12, eos_token_ids=frozenset({2})
    )
    want = [token for token in want if token != 2]
    assert len(want) > 3
    [whole] = ask(model, text_input=TEXT, max_tokens=12).sent
    assert whole.of("token_ids").tolist() == want
    pieces = ask(model, text_input=TEXT, max_tokens=12, stream=True).sent
    assert [int(piece.of("token_ids")[0]) for piece in pieces] == want
    assert b"".join(piece.of("text_output")[0] for piece in pieces) == whole.of("text_output")[0]
    chat = ask(model, text_input="hello", max_tokens=4, chat=True).sent[0]
    plain = ask(model, text_input="<s>hello: ", max_tokens=4).sent[0]
    assert chat.of("token_ids").tolist() == plain.of("token_ids").tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_greedy_knows_no_penalty_of_the_author(
    model: Any, onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(onnx_folder, tmp_path / "onnx")
    settings = json.loads((tmp_path / "onnx/genai_config.json").read_text())
    settings["search"]["repetition_penalty"] = 50.0
    (tmp_path / "onnx/genai_config.json").write_text(json.dumps(settings))
    made = triton_from_onnx(tmp_path / "onnx", tmp_path / "repository", name="tiny").path
    config = parsed(made, "tiny")
    pretend_triton(monkeypatch, config)
    punished = load(made / "tiny/1/model.py").TritonPythonModel()
    punished.initialize(arguments(made, config))

    def tokens(of: Any, **options: float) -> list[int]:
        [answer] = ask(of, text_input=TEXT, max_tokens=12, **options).sent
        found: list[int] = answer.of("token_ids").tolist()
        return found

    assert tokens(punished) == tokens(model)
    assert tokens(punished, top_k=1) != tokens(model, top_k=1)  # sampling keeps it
    punished.finalize()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sampling_follows_its_seed(model: Any) -> None:
    def sampled(seed: int) -> list[int]:
        options = {"temperature": 5.0, "top_k": 50, "random_seed": seed}
        found: list[int] = (
            ask(model, text_input=TEXT, max_tokens=8, **options).sent[0].of("token_ids").tolist()
        )
        return found

    assert sampled(1) == sampled(1) and len({tuple(sampled(seed)) for seed in range(4)}) > 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_bad_request_fails_alone(model: Any) -> None:
    bad = [{"text_input": ""}, {"text_input": "x" * 600}, {"text_input": TEXT, "max_tokens": 0}]
    requests = [FakeRequest(inputs) for inputs in [*bad, {"text_input": TEXT, "max_tokens": 2}]]
    model.execute(requests)
    words = ["is empty", "600 tokens, and the model reads 512", "at least 1, got 0"]
    for request, word in zip(requests, words, strict=False):
        assert word in str(request.sender.sent[0].error) and request.sender.finished
    assert requests[-1].sender.sent[0].error is None
    cancelled = FakeRequest(
        {"text_input": TEXT, "max_tokens": 50, "stream": True}, FakeSender(cancel_after=3)
    )
    model.execute([cancelled])
    assert len(cancelled.sender.sent) == 3 and cancelled.sender.finished


def test_a_missing_neighbour_is_named(repository: Path) -> None:
    config = parsed(repository, "tiny")
    config.parameters["model_folder"].string_value = "../elsewhere"
    made = load(repository / "tiny/1/model.py").TritonPythonModel()
    with pytest.raises(RuntimeError, match=r"no genai_config\.json: the parameter model_folder"):
        made.initialize(arguments(repository, config))


def test_the_decode_model_is_decoupled_and_its_options_optional(repository: Path) -> None:
    config = parsed(repository, "tiny")
    assert config.backend == "python" and config.model_transaction_policy.decoupled
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]
    assert (repository / "tiny" / "1" / "model.py").is_file()


def test_another_form_of_the_graph_is_one_more_model(tmp_path: Path) -> None:
    engine = TritonModel(
        name="tiny-engine",
        backend="tensorrt",
        inputs=[TritonTensor("input_ids", "TYPE_INT64", (-1, -1))],
        outputs=[TritonTensor("logits", "TYPE_FP16", (-1, -1, 272))],
        place=lambda version: write_bytes(version / "model.plan", b"plan"),
        kind="KIND_GPU",
    )
    made = write_repository(tmp_path / "repository", [engine])
    assert made.models == ("tiny-engine",) and parsed(made.path, "tiny-engine").instance_group[0].kind == 1
    assert (made.path / "tiny-engine/1/model.plan").read_bytes() == b"plan"


def test_the_command_writes_a_repository(onnx_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "served"
    result = CliRunner().invoke(package, [str(onnx_folder), "--triton", "--out", str(target), "--json"])
    assert result.exit_code == 0, result.output
    models = json.loads(result.stdout)["models"]
    assert models == [onnx_folder.parent.name, f"{onnx_folder.parent.name}-graph"]
    again = CliRunner().invoke(package, [str(onnx_folder), "--triton", "--out", str(target)])
    assert isinstance(again.exception, NirvanaError) and "--force" in str(again.exception.hint)
    for name in ("", "no spaces", "../up"):
        with pytest.raises(NirvanaError, match="cannot be called"):
            triton_from_onnx(onnx_folder, tmp_path / "x", name=name)
    (tmp_path / "empty").mkdir()
    nothing = CliRunner().invoke(package, [str(tmp_path / "empty"), "--triton"])
    assert isinstance(nothing.exception, NirvanaError) and "onnx/model.onnx" in nothing.exception.message
    (tmp_path / "seq2seq").mkdir()
    (tmp_path / "seq2seq" / "encoder_model.onnx").touch()
    with pytest.raises(NirvanaError, match="The ONNX model of an encoder-decoder cannot be packaged"):
        package_triton(tmp_path / "seq2seq")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.onnx").write_bytes((onnx_folder / "model.onnx").read_bytes())
    with pytest.raises(NirvanaError, match=r"no genai_config\.json"):
        triton_from_onnx(tmp_path / "bare", tmp_path / "x", name="bare")
