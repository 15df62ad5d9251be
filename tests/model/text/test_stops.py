"""Stop ids and sampling settings: whatever file names them, every consumer gets the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders.extras import needs
from builders.gguf_files import write_merges
from builders.odd import edit
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, load_tokenizer
from nirvana_deploy.model.text.stops import sampling_settings, stop_ids
from nirvana_deploy.package.gguf_export import gguf_from_checkpoint
from nirvana_deploy.runtime.genai import GenaiModel
from nirvana_deploy.runtime.text import load_text_side
from nirvana_deploy.verify.compare import TextCheck, compare_texts

GENERATION = "generation_config.json"
NAMED: list[tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = [
    ({"eos_token_id": 2}, {"eos_token_id": [2, 7, 9]}, (2, 7, 9)),
    ({"eos_token_id": None}, {"eos_token_id": 7, "bos_token_id": 3}, (7, 2)),
    ({"eos_token_id": [5, 6]}, {"eos_token_id": None}, (5, 6, 2)),
    ({"eos_token_id": None, "pad_token_id": None, "bos_token_id": None}, {}, (2,)),
    ({"eos_token_id": 8}, {"eos_token_id": 7, "temperature": 0.6, "top_p": 0.9, "top_k": None}, (7, 8, 2)),
]


def folder_with(folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> Path:
    """A model whose tokenizer ends texts with 2."""
    write_tiny(folder, "llama-tied")
    write_merges(folder)
    (folder / GENERATION).unlink()
    edit(folder, **config)
    return edit(folder, file=GENERATION, **generation) if generation else folder


@pytest.mark.consumer(
    "onnxruntime-genai",
    package="onnxruntime-genai",
    artifact="ONNX folders whose files name other stop ids, or none",
    proof="Model and Tokenizer load, with the stop ids of all files",
)
@pytest.mark.parametrize(("config", "generation", "stops"), NAMED, ids=lambda value: str(value)[:20])
def test_every_consumer_gets_the_same_stop_ids(
    config: dict[str, Any], generation: dict[str, Any], stops: tuple[int, ...], tmp_path: Path
) -> None:
    folder = folder_with(tmp_path / "model", config, generation)
    checkpoint = Checkpoint.open(folder)
    assert stop_ids(folder) == stops and checkpoint.stop_token_ids == set(stops)
    onnx_from_checkpoint(checkpoint, tmp_path / "onnx")
    assert load_text_side(tmp_path / "onnx")[1] == load_text_side(folder)[1] == set(stops)
    genai = needs("onnxruntime_genai")
    model = genai.Model(str(tmp_path / "onnx"))
    assert set(genai.Tokenizer(model).eos_token_ids) == set(stops)
    search = read_json(tmp_path / "onnx" / "genai_config.json")["search"]
    assert {key: search[key] for key in ("temperature", "top_p") if key in search} == {
        key: value for key, value in generation.items() if key in ("temperature", "top_p")
    }
    gguf = needs("gguf")
    gguf_from_checkpoint(checkpoint, tmp_path / "model.gguf", weight_type="f32")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = [reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    assert {field.contents() for field in fields if field is not None} == set(stops)
    assert fields[0].contents() == 2


def test_what_no_file_names_counts_as_the_config_class_says(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama-tied")
    edit(folder, "eos_token_id")
    for name in ("tokenizer.json", "tokenizer_config.json", GENERATION):
        (folder / name).unlink()
    assert stop_ids(folder) == (2,)  # LlamaConfig's
    assert stop_ids(write_t5(tmp_path / "t5", "t5")) == (1, 2)  # T5Config's, and its tokenizer's


@pytest.mark.parametrize("wrong", ["</s>", 1.5, [1, True], -1])
def test_stop_ids_that_are_none_are_refused(wrong: object, tmp_path: Path) -> None:
    folder = edit(write_tiny(tmp_path / "model", "llama-tied"), file=GENERATION, eos_token_id=wrong)
    with pytest.raises(NirvanaError, match=r"generation_config\.json: 'eos_token_id' must be token ids"):
        stop_ids(folder)


def test_sampling_settings_of_another_type_are_refused(tmp_path: Path) -> None:
    folder = edit(tmp_path, file=GENERATION, temperature="warm")
    with pytest.raises(NirvanaError, match="'temperature' must be a float, got 'warm'"):
        sampling_settings(folder)


@pytest.mark.consumer(
    "onnxruntime-genai",
    package="onnxruntime-genai",
    artifact="Tokenizers that put a token before each text, and those that do not",
    proof="verify counts the texts that it encodes as transformers does, and names one that differs",
)
@pytest.mark.parametrize("begins", [True, False])
def test_prompt_text_is_compared_with_genais_tokenizer(begins: bool, tmp_path: Path) -> None:
    needs("onnxruntime_genai")
    folder = write_tiny(tmp_path / "model", "llama-tied")
    write_merges(folder)
    if begins:
        backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        ).save_pretrained(folder)
    onnx_from_checkpoint(Checkpoint.open(folder), tmp_path / "onnx")

    def compared(checkpoint: Path) -> TextCheck:
        encode = GenaiModel(tmp_path / "onnx").encoder()
        return compare_texts("onnxruntime-genai", load_tokenizer(checkpoint), encode)

    check = compared(folder)
    assert (check.equal_texts, check.differs) == (check.texts, None)
    write_tiny(tmp_path / "other", "llama-tied")  # its tokenizer merges nothing
    check = compared(tmp_path / "other")
    assert check.equal_texts < check.texts and "to onnxruntime-genai" in (check.differs or "")
