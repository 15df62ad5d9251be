"""The engines of an encoder-decoder in Triton: the repository, and its model.py run on a fake driver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.fake_cuda import FakeDriver
from builders.fake_tensorrt import fake_module, write_fake_engine
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
from builders.tiny_t5 import write_t5
from click.testing import CliRunner

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.cli.package import package
from nirvana_deploy.engine.drop_branch import drop_cache_branch
from nirvana_deploy.engine.profile import profiles_for, shapes_of
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.source import read_source
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.layout import DECODER_FILE, ENCODER_FILE
from nirvana_deploy.package.triton_engine import triton_from_seq2seq_engines
from nirvana_deploy.runtime.onnxruntime.encoder_decoder import OrtSeq2Seq
from nirvana_deploy.runtime.runner import greedy_tokens
from nirvana_deploy.runtime.tensorrt.encoder_decoder import TensorRTSeq2Seq
from nirvana_deploy.runtime.tensorrt.record import record_path
from nirvana_deploy.runtime.text import load_text_side

TEXT = "Whatever it says, it says it"
LENGTHS = Lengths(max_batch=1, max_length=40, opt_prompt=8, opt_length=12)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triton-t5")
    onnx_from_checkpoint(Checkpoint.open(write_t5(root / "model", "t5")), root / "onnx")
    return root / "onnx"


@pytest.fixture(scope="module")
def decoder(exported: Path) -> Path:
    """The decoder's engine, the encoder's beside it, and the ONNX folder of both."""
    out = exported.parent / "engine"
    folder = out / "t5-onnx"
    shutil.copytree(exported, folder)
    drop_cache_branch(folder / DECODER_FILE)
    for part, file in (("encoder", ENCODER_FILE), ("decoder", DECODER_FILE)):
        source = read_source(folder / file)
        profiles = [shapes_of(source, profile) for profile in profiles_for(source, LENGTHS)]
        write_fake_engine(out / f"t5-{part}.engine", folder, profiles=profiles, file=file, part=part)
    return out / "t5-decoder.engine"


@pytest.fixture(scope="module")
def repository(decoder: Path) -> Path:
    """As the command writes it."""
    out = decoder.parent / "repository"
    arguments = [str(decoder.parent), "--triton", "--engine", str(decoder), "--name", "t5", "--out", str(out)]
    result = CliRunner().invoke(package, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "t5" in result.stdout
    return out


@pytest.fixture
def model(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """model.py of the repository, initialized as Triton does it, on a fake driver."""
    config, driver = parsed(repository, "t5"), FakeDriver()
    pretend_triton(monkeypatch, config)

    def open_fake(path: Path, *, device_index: int) -> TensorRTSeq2Seq:
        return TensorRTSeq2Seq(path, device_index=device_index, driver=driver, module=fake_module(driver))

    with monkeypatch.context() as patched:
        patched.setattr("nirvana_deploy.runtime.tensorrt.encoder_decoder.TensorRTSeq2Seq", open_fake)
        made = load(repository / "t5/1/model.py").TritonPythonModel()
        made.initialize(arguments(repository, config))
    yield made
    made.finalize()
    assert driver.leaks == {}


def test_the_repository_holds_all_that_the_model_opens(repository: Path) -> None:
    config = parsed(repository, "t5")
    assert (config.backend, config.model_transaction_policy.decoupled) == ("python", True)
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]
    names = {path.name for path in (repository / "t5/1/engine").iterdir()}
    engines = {f"t5-{part}.{end}" for part in ("encoder", "decoder") for end in ("engine", "json")}
    assert names >= {*engines, "config.json", "tokenizer.json"}


def test_the_model_says_what_the_onnx_folder_says(model: Any, exported: Path) -> None:
    tokenizer, stops = load_text_side(exported)
    prompt = np.array([tokenizer(TEXT)["input_ids"]])
    found = greedy_tokens(OrtSeq2Seq(exported, threads=1), prompt, max_new_tokens=12, eos_token_ids=stops)
    want = [token for token in found if token not in stops]
    assert len(want) > 3
    [whole] = ask(model, text_input=TEXT, max_tokens=12).sent
    assert whole.of("token_ids").tolist() == want
    pieces = ask(model, text_input=TEXT, max_tokens=12, stream=True).sent
    assert [int(piece.of("token_ids")[0]) for piece in pieces] == want
    assert b"".join(piece.of("text_output")[0] for piece in pieces) == whole.of("text_output")[0]


def test_a_bad_request_fails_alone(model: Any) -> None:
    bad = [{"text_input": "x" * 600}, {"text_input": TEXT, "max_tokens": 0}]
    requests = [FakeRequest(inputs) for inputs in [*bad, {"text_input": TEXT, "max_tokens": 2}]]
    model.execute(requests)
    for request, word in zip(requests, ["'encoder' takes input_ids", "at least 1, got 0"], strict=False):
        assert word in str(request.sender.sent[0].error) and request.sender.finished
    assert requests[-1].sender.sent[0].error is None
    cancelled = FakeRequest({"text_input": TEXT, "max_tokens": 9, "stream": True}, FakeSender(cancel_after=2))
    model.execute([cancelled])
    assert len(cancelled.sender.sent) == 2 and cancelled.sender.finished


def test_what_cannot_be_served_is_refused(decoder: Path, exported: Path, tmp_path: Path) -> None:
    encoder = decoder.with_name("t5-encoder.engine")
    with pytest.raises(NirvanaError, match=r"is the encoder of an encoder-decoder.*\n.*-decoder\.engine"):
        triton_from_seq2seq_engines(encoder, exported, tmp_path / "out", name="t5")
    two = [str(tmp_path), "--triton", "--engine", str(decoder), "--engine", str(encoder)]
    two += ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(package, two)
    assert isinstance(result.exception, NirvanaError)
    assert "one pair of engines, got 2 files" in result.exception.message
    for path in (decoder, encoder):
        shutil.copy(path, tmp_path)
        write_json(tmp_path / record_path(path).name, {**read_json(record_path(path)), "stripped": True})
    with pytest.raises(NirvanaError, match="holds no weights"):
        triton_from_seq2seq_engines(tmp_path / decoder.name, exported, tmp_path / "out", name="t5")
    assert not (tmp_path / "out").exists()
