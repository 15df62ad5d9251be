"""Damaged and hostile files of a model: one sentence each, never a trace, and nothing waits."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.odd import edit
from builders.tiny import write_tiny
from builders.unix import named_pipe
from safetensors.torch import load_file, save_file

from nirvana_deploy.base.errors import NirvanaError, TokenizerError
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.runtime.text import load_text_side

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
GENERATION, WEIGHTS, INDEX = "generation_config.json", "model.safetensors", "model.safetensors.index.json"


def written(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """What is no file under the name of one."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def header(content: Any, *, length: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    """A safetensors file with a header of any content."""
    text = json.dumps(content).encode() if not isinstance(content, bytes) else content
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def index_of(weight_map: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def tokenizer_with(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        value = json.loads((folder / TOKENIZER).read_text())
        change(value)
        (folder / TOKENIZER).write_text(json.dumps(value))

    return damage


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


TENSOR = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
HOSTILE: dict[str, Callable[[Path], object]] = {
    "config: nested": written("config.json", "[" * 10**5),
    "config: a list": written("config.json", "[]"),
    "config: a number of digits": written("config.json", '{"vocab_size": ' + "9" * 5000 + "}"),
    "config: not UTF-8": written("config.json", b"\xff\xfe{}"),
    "config: empty": written("config.json", ""),
    "config: a folder": replaced("config.json", Path.mkdir),
    "config: a pipe": replaced("config.json", named_pipe),
    "config: dangling": replaced("config.json", dangling),
    "generation: a list": written(GENERATION, "[1]"),
    "generation: text for an id": written(GENERATION, '{"eos_token_id": "</s>"}'),
    "generation: nested": written(GENERATION, '{"a":' * 10**5),
    "generation: a pipe": replaced(GENERATION, named_pipe),
    "generation: a folder": replaced(GENERATION, Path.mkdir),
    "generation: dangling": replaced(GENERATION, dangling),
    "weights: empty": written(WEIGHTS, b""),
    "weights: a huge header": written(WEIGHTS, header({}, length=1 << 62)),
    "weights: a header of no JSON": written(WEIGHTS, header(b"{{{{")),
    "weights: a list": written(WEIGHTS, header([])),
    "weights: nested": written(WEIGHTS, header(b"[" * 10**5)),
    "weights: an unknown type": written(WEIGHTS, header({"a": {**TENSOR, "dtype": "F7"}})),
    "weights: beyond the end": written(WEIGHTS, header({"a": {**TENSOR, "data_offsets": [0, 1 << 40]}})),
    "weights: a negative size": written(WEIGHTS, header({"a": {**TENSOR, "shape": [-4, -4]}})),
    "weights: another model": written(WEIGHTS, header({"a": TENSOR})),
    "weights: a name of 10,000 letters": written(WEIGHTS, header({"a" * 10**4: TENSOR})),
    "weights: a folder": replaced(WEIGHTS, Path.mkdir),
    "weights: a pipe": replaced(WEIGHTS, named_pipe),
    "weights: dangling": replaced(WEIGHTS, dangling),
    "index: a shard that is missing": index_of({"model.norm.weight": "model-00002-of-00002.safetensors"}),
    "index: a name of 300 letters": index_of({"model.norm.weight": "a" * 300 + ".safetensors"}),
    "index: a zero in a name": index_of({"model.norm.weight": "a\0b.safetensors"}),
    "index: no name": index_of({"model.norm.weight": None}),
    "index: a list": index_of([["a", "b"]]),
    "index: outside": index_of({"model.norm.weight": "../model.safetensors"}),
    "index: one tensor of many": index_of({"model.norm.weight": "model-00001-of-00001.safetensors"}),
    "tokenizer: no JSON": written(TOKENIZER, "{"),
    "tokenizer: a list": written(TOKENIZER, "[]"),
    "tokenizer: an empty object": written(TOKENIZER, "{}"),
    "tokenizer: nested": written(TOKENIZER, "[" * 10**5),
    "tokenizer: no model": tokenizer_with(lambda value: value.pop("model")),
    "tokenizer: an unknown model": tokenizer_with(lambda value: value["model"].update(type="Spiral")),
    "tokenizer: text for ids": tokenizer_with(
        lambda value: value["model"].update(vocab={"a": "b"}),
    ),
    "tokenizer: merges of what is not there": tokenizer_with(
        lambda value: value["model"].update(merges=[["zz", "qq"]])
    ),
    "tokenizer: added tokens of another form": tokenizer_with(lambda value: value.update(added_tokens=[7])),
    "tokenizer: an added token without id": tokenizer_with(
        lambda value: value.update(added_tokens=[{"content": "x"}])
    ),
    "tokenizer: a pattern that is none": tokenizer_with(
        lambda value: value.update(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(((("},
                "behavior": "Isolated",
                "invert": False,
            }
        )
    ),
    "tokenizer: a pipe": replaced(TOKENIZER, named_pipe),
    "tokenizer: a folder": replaced(TOKENIZER, Path.mkdir),
    "tokenizer: dangling": replaced(TOKENIZER, dangling),
    "settings: a list": written(SETTINGS, "[]"),
    "settings: an unknown class": written(SETTINGS, '{"tokenizer_class": 5}'),
    "settings: tokens of another form": written(SETTINGS, '{"eos_token": [1], "added_tokens_decoder": 3}'),
    "settings: a pipe": replaced(SETTINGS, named_pipe),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("whole") / "model", "llama-tied")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_a_sentence(name: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    HOSTILE[name](folder)
    with pytest.raises(NirvanaError) as refused:
        checkpoint = Checkpoint.open(resolve_model(str(folder)).path)
        assert checkpoint.tokenizer
        load_text_side(folder)
    assert len(str(refused.value).splitlines()) <= 10 and len(str(refused.value)) < 2000


def test_a_library_that_gives_no_reason_is_named(whole: Path) -> None:
    assert "cannot be loaded: MemoryError." in str(TokenizerError(whole, MemoryError()))


def test_weights_without_metadata_are_read(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    assert Checkpoint.open(edit(folder)).load()
