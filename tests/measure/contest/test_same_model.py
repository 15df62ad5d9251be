"""Artifacts of one model are told from those of another by their files, before anything is timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from builders.extras import needs
from builders.gguf_files import rewritten, write_merges
from builders.tiny import VOCABULARY, write_tiny

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.measure.contest.same_model import ModelFacts, facts_of, require_same_model

TOKENS = {number: f"t{number}" for number in range(272)}
OTHER_TOKENS = {**TOKENS, **dict.fromkeys(range(9, 20), "x")}
LLAMA = ModelFacts(frozenset(["llama"]), 272, 48, 3, TOKENS)


def test_a_checkpoint_and_its_gguf_file_say_the_same(tmp_path: Path) -> None:
    gguf = needs("gguf")
    from nirvana_deploy import package_gguf

    checkpoint = write_tiny(tmp_path / "checkpoint", "llama-tied")
    write_merges(checkpoint)
    file = package_gguf(checkpoint, tmp_path / "model.gguf", weight_type="f32").path
    folder, packed = facts_of(checkpoint), facts_of(file)
    assert (folder.vocab_size, folder.hidden_size, folder.layers) == (VOCABULARY, 48, 3)
    assert (packed.vocab_size, packed.hidden_size, packed.layers) == (VOCABULARY, 48, 3)
    assert folder.families < packed.families
    assert require_same_model({"checkpoint": folder, "model.gguf": packed}) == []

    words = list(gguf.GGUFReader(file).get_field("tokenizer.ggml.tokens").contents())
    other = rewritten(
        file, tmp_path / "other.gguf", extra={"tokenizer.ggml.tokens": [*words[:3], *reversed(words[3:])]}
    )
    with pytest.raises(NirvanaError, match=r"Not the same model: checkpoint has .* as token 3, and other"):
        require_same_model({"checkpoint": folder, "other": facts_of(other)})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            replace(LLAMA, vocab_size=300),
            r"first has a vocabulary of 272 tokens, and second has .* 300 tokens",
        ),
        (
            replace(LLAMA, families=frozenset(["qwen2"])),
            "first has the family llama, and second has .* qwen2",
        ),
        (replace(LLAMA, tokens={**LLAMA.tokens, **dict.fromkeys(range(9, 20), "x")}), "'t9' as token 9"),
    ],
    ids=["vocabulary", "family", "tokens"],
)
def test_another_model_is_refused(other: ModelFacts, said: str) -> None:
    with pytest.raises(NirvanaError, match=said) as refused:
        require_same_model({"first": LLAMA, "unknown": ModelFacts(), "second": other})
    assert refused.value.message.startswith("Not the same model: ") and refused.value.hint


def test_a_special_token_of_another_name_and_a_padded_vocabulary_are_no_other_model() -> None:
    renamed = replace(LLAMA, tokens={**TOKENS, 0: "<|endoftext|>"})
    assert require_same_model({"a": LLAMA, "b": renamed, "c": replace(LLAMA, tokens=None)}) == []


def test_another_size_of_the_family_is_a_caution() -> None:
    (said,) = require_same_model({"a": LLAMA, "b": replace(LLAMA, layers=2)})
    assert "not the same model: the number of layers is 3 in a, 2 in b" in said


def test_a_folder_for_onnxruntime_genai_is_read_and_a_list_of_pieces_too(tmp_path: Path) -> None:
    decoder = {"hidden_size": 8, "num_hidden_layers": 2}
    config = {"model": {"type": "llama", "vocab_size": 3, "decoder": decoder}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    pieces = {
        "model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]},
        "added_tokens": [{"id": 2, "content": "<end>"}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(pieces))
    tokens = {0: "<unk>", 1: "a", 2: "<end>"}
    assert facts_of(tmp_path) == ModelFacts(frozenset(["llama"]), 3, 8, 2, tokens)
