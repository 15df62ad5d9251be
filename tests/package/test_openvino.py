"""The folder for openvino-genai: its pipeline says what the ONNX folder says."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.extras import needs
from builders.plans import plan_for
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from click.testing import CliRunner
from huggingface_hub import ModelCard

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.cli.main import commands
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, load_tokenizer
from nirvana_deploy.model.text.stops import stop_ids
from nirvana_deploy.output.layout import IR_FILE
from nirvana_deploy.package.openvino import openvino_from_onnx
from nirvana_deploy.package.stage import package_openvino
from nirvana_deploy.pipeline.alone.packages import package_openvino as package_with_card
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.runtime.openvino.decoder import OpenVinoDecoder
from nirvana_deploy.runtime.openvino.session import read_portable
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.runner import greedy_tokens

openvino_genai = needs("openvino_genai")
openvino_tokenizers = needs("openvino_tokenizers")

PROMPTS = ("Whatever it says", " it says it", "ü€")
AS_STORED = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX folder of a globally pruned Llama: its layers differ."""
    folder = tmp_path_factory.mktemp("openvino")
    dense = write_tiny(folder / "dense", "llama-tied")
    (dense / "chat_template.jinja").write_text("{{ '<s>' + messages[0]['content'] + ': ' }}")
    slice_checkpoint(Checkpoint.open(dense), plan_for(dense), folder / "checkpoint")
    onnx_from_checkpoint(Checkpoint.open(folder / "checkpoint"), folder / "onnx")
    return folder / "onnx"


def pipeline_tokens(folder: Path, prompt: np.ndarray[Any, Any], count: int) -> list[int]:
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **AS_STORED)
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens, settings.do_sample, settings.ignore_eos = count, False, True
    import openvino

    mask = openvino.Tensor(np.ones_like(prompt))
    tokenized = openvino_genai.TokenizedInputs(openvino.Tensor(prompt), mask)
    return list(pipeline.generate(tokenized, settings).tokens[0])


@pytest.mark.consumer(
    "openvino-genai",
    artifact="folder of package --openvino, layers that differ",
    proof="greedy tokens equal those of the ONNX folder, in float, int8 and w4",
    package="openvino-genai",
)
@pytest.mark.parametrize("scheme", [None, "int8", "w4"])
def test_the_pipeline_writes_the_tokens_of_the_onnx_folder(
    onnx_folder: Path, scheme: str | None, tmp_path: Path
) -> None:
    source, prompt = onnx_folder, np.array([[5, 6, 7, 99, 41]])
    if scheme is not None:
        source = tmp_path / "q"
        windows = np.random.default_rng(2).integers(3, 272, size=(6, 20))
        recipe = Quantization(scheme=scheme)
        quantize_onnx(onnx_folder, source, recipe, calibration=windows if scheme == "int8" else None)
    made = openvino_from_onnx(source, tmp_path / "openvino")
    assert (made.path / "openvino_model.bin").stat().st_size < made.size_bytes
    with OpenVinoDecoder(source, runtime="openvino-cpu", threads=1) as runner:
        expected = greedy_tokens(runner, prompt, max_new_tokens=12)
    assert pipeline_tokens(made.path, prompt, 12) == expected


def test_its_tokenizer_and_template_are_those_of_transformers(onnx_folder: Path, tmp_path: Path) -> None:
    folder = openvino_from_onnx(onnx_folder, tmp_path / "openvino").path
    theirs, ours = openvino_genai.Tokenizer(str(folder)), load_tokenizer(onnx_folder.parent / "checkpoint")
    for text in PROMPTS:
        ids = theirs.encode(text).input_ids.data[0].tolist()
        assert ids == ours(text)["input_ids"]
        assert theirs.decode(ids) == text
    asked = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(asked, add_generation_prompt=True) == "<s>Hi: "


@pytest.mark.parametrize("own", [None, {"eos_token_id": 7, "top_k": 5}])
def test_every_stop_id_ends_its_answers(
    onnx_folder: Path, own: dict[str, Any] | None, tmp_path: Path
) -> None:
    source = tmp_path / "onnx"
    shutil.copytree(onnx_folder, source)
    (source / "generation_config.json").unlink(missing_ok=True)
    if own is not None:
        (source / "generation_config.json").write_text(json.dumps(own))
    folder = openvino_from_onnx(source, tmp_path / "openvino").path
    read = openvino_genai.GenerationConfig(str(folder / "generation_config.json"))
    assert read.stop_token_ids | {read.eos_token_id} == set(stop_ids(source))
    assert len(stop_ids(source)) == (1 if own is None else 2)
    assert read.top_k == 5 or own is None


def test_the_command_writes_it_and_says_how_to_run_it(onnx_folder: Path, tmp_path: Path) -> None:
    arguments = ["package", str(onnx_folder), "--openvino", "--out", str(tmp_path / "made")]
    shown = CliRunner().invoke(commands, arguments, catch_exceptions=False)
    assert "for openvino-genai" in shown.stdout and "LLMPipeline(" in shown.stdout
    assert f"hf upload YOUR-NAME/YOUR-MODEL {tmp_path / 'made'} ." in shown.stdout
    again = CliRunner().invoke(commands, [*arguments, "--force", "--json"], catch_exceptions=False)
    assert json.loads(again.stdout)["out"] == str(tmp_path / "made")


def test_what_is_there_is_kept(onnx_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "openvino_model.xml").write_text("of another version")
    for force in (False, True):
        with pytest.raises(NirvanaError, match="--out"):
            package_openvino(onnx_folder, tmp_path / "theirs", force=force)
    assert (tmp_path / "theirs" / "openvino_model.xml").read_text() == "of another version"


def test_bad_sources_are_named(onnx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"holds no onnx/model\.onnx"):
        package_openvino(tmp_path, tmp_path / "out")
    onnx_from_checkpoint(Checkpoint.open(write_t5(tmp_path / "model", "t5")), tmp_path / "t5")
    with pytest.raises(NirvanaError, match="holds an encoder-decoder"):
        package_openvino(tmp_path / "t5", tmp_path / "out")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (bare / name).write_bytes((onnx_folder / name).read_bytes())
    with pytest.raises(NirvanaError, match=r"has no tokenizer\.json"):
        package_openvino(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_its_tokenizers_the_extra_is_named(
    onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"'openvino-tokenizers'.*\n.*\[openvino\]"):
        openvino_from_onnx(onnx_folder, tmp_path / "out")


@pytest.mark.parametrize("command", ["generate", "benchmark", "verify", "serve"])
def test_a_written_folder_is_recognised_and_told_what_runs_it(
    onnx_folder: Path, command: str, tmp_path: Path
) -> None:
    folder = openvino_from_onnx(onnx_folder, tmp_path / "openvino").path
    options = ["--prompt", "x"] if command == "generate" else []
    for path in (folder, folder / IR_FILE) if command == "generate" else (folder,):
        refused = CliRunner().invoke(commands, [command, str(path), *options]).exception
        assert isinstance(refused, NirvanaError) and "openvino_genai.LLMPipeline(" in str(refused)
        assert "name the ONNX folder that it was made from" in str(refused)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    with pytest.raises(NirvanaError, match=rf"name {re.escape(str(tmp_path / 'onnx'))}\."):
        read_portable(folder)


@pytest.mark.parametrize(("head", "said"), [(b'<net name="x" version="7">', "7"), (b"of another", "none")])
def test_an_ir_of_another_version_is_refused(tmp_path: Path, head: bytes, said: str) -> None:
    (tmp_path / IR_FILE).write_bytes(b'<?xml version="1.0"?>\n' + head)
    for opened in (open_runner, read_portable):
        with pytest.raises(NirvanaError, match=rf"it says {said}, and 10 and 11 are read.*\n.*--openvino"):
            opened(tmp_path)


def test_the_folder_that_people_publish_is_whole(onnx_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "onnx"
    shutil.copytree(onnx_folder, source)
    (source / "LICENSE").write_text("theirs")
    (source / "USE_POLICY.md").write_text("theirs too")
    made = package_with_card(source, tmp_path / "made").path
    assert (made / "LICENSE").read_text() == "theirs" and (made / "USE_POLICY.md").is_file()
    card = ModelCard((made / "README.md").read_text(encoding="utf-8"))
    assert card.data.library_name == "openvino" and "openvino" in card.data.tags
    assert "LLMPipeline" in card.content and "`USE_POLICY.md`" in card.content
    assert str(tmp_path) not in card.content
