"""The tokenizer of a GGUF file is what llama.cpp makes of the file, and goes back into one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders.extras import needs
from builders.gguf_files import rewritten
from builders.llama_cpp import CONSUMER_VERSION, installed_llama_cpp, run_llama_cpp
from builders.tiny import _size
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint, load_tokenizer
from nirvana_deploy.model.gguf.convert import converted
from nirvana_deploy.package.gguf_export import gguf_from_checkpoint

gguf = needs("gguf")
TEXTS = [
    "in 1984,\n\n12345 = 1.5",
    "  spaces   and\ttabs\n\n x\r\n",
    "naïve café ½ — 東京 🙂 ",
    "don't we'll I'VE it'S DON'T McGee",
    "x=1234567890;y=3.14<=>$5^~|//\n/",
]
BEGINNING = {"llama-bpe", "llama3", "falcon3", "tekken"}
"""Names under which llama.cpp begins texts with the first token unasked."""
NAMES: list[str | None] = [
    *("gpt-2", "olmo", "smollm", "refact", "starcoder", "qwen2", "stablelm2", "dbrx", "smaug-bpe"),
    *("default", None, *sorted(BEGINNING), "gpt-4o"),
]


def byte_level() -> Tokenizer:
    """Merged across words, so that each way to cut them gives other tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, *(text[3:] for text in TEXTS), "1984", "12345"] * 3, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """BPE with byte fallback that puts a space in front of a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    space = [normalizers.Prepend("▁"), normalizers.Replace(pattern=" ", content="▁")]
    tokenizer.normalizer = normalizers.Sequence(space)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def written(folder: Path, tokenizer: Tokenizer) -> Path:
    """A GGUF file of a tiny Llama with this tokenizer."""
    config = LlamaConfig(**{**_size(), "vocab_size": tokenizer.get_vocab_size()})
    LlamaForCausalLM(config).save_pretrained(folder)
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    # byte pieces are ordinary tokens; they were only named to the trainer as specials
    saved["added_tokens"] = [t for t in saved["added_tokens"] if not t["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    gguf_from_checkpoint(Checkpoint.open(folder), folder / "model.gguf", weight_type="f32")
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("bytes"), byte_level())


@pytest.fixture(scope="module")
def of_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("pieces"), sentencepiece_like())


@pytest.mark.consumer(
    "llama.cpp",
    artifact="GGUF files of every way to cut text, read as input",
    proof=f"the tokens of {len(TEXTS)} texts each equal those of the folder it is converted to",
    version=CONSUMER_VERSION,
)
def test_a_gguf_file_is_cut_as_llama_cpp_cuts_it(
    of_bytes: Path, of_pieces: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    assert pytestconfig.cache is not None
    llama_cpp = installed_llama_cpp(pytestconfig.cache)
    files = [_saying(of_bytes, tmp_path / f"{name}.gguf", name) for name in NAMES]
    for prefix in (True, False):
        key = {"tokenizer.ggml.add_space_prefix": prefix}
        files.append(rewritten(of_pieces, tmp_path / f"prefix-{prefix}.gguf", extra=key))
    jobs = [{"path": str(file), "prompts": [], "new_tokens": 0, "texts": TEXTS} for file in files]
    different = set()
    for file, answer in zip(files, run_llama_cpp(llama_cpp, jobs, tmp_path), strict=True):
        assert "error" not in answer, (file.name, answer)
        tokenizer = load_tokenizer(converted(file, cache=tmp_path / "cache").folder)
        ours = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        assert ours == answer["tokenized"], file.name
        assert [tokenizer.decode(ids) for ids in ours] == TEXTS, file.name
        different.add(str(ours))
    assert len(different) >= 9  # the texts tell the ways apart


def _saying(source: Path, out: Path, name: str | None) -> Path:
    """The file with another name for its cuts, and no word about the first token."""
    drop = ["tokenizer.ggml.add_bos_token", *(["tokenizer.ggml.pre"] if name is None else [])]
    extra = {} if name is None else {"tokenizer.ggml.pre": name}
    return rewritten(source, out, extra=extra, drop=drop)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"])
def test_a_name_comes_back_and_with_it_the_first_token(name: str, of_bytes: Path, tmp_path: Path) -> None:
    file = _saying(of_bytes, tmp_path / "named.gguf", name)
    folder = converted(file, cache=tmp_path / "cache").folder
    begins = name in BEGINNING
    assert (load_tokenizer(folder)("to")["input_ids"][0] == 1) == begins
    gguf_from_checkpoint(Checkpoint.open(folder), tmp_path / "again.gguf")
    fields = gguf.GGUFReader(tmp_path / "again.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["tokenizer.ggml.add_bos_token"].contents() == begins


def test_a_file_that_says_so_begins_no_text(of_bytes: Path, tmp_path: Path) -> None:
    said = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}
    file = rewritten(of_bytes, tmp_path / "said.gguf", extra=said)
    assert load_tokenizer(converted(file, cache=tmp_path / "cache").folder)("to")["input_ids"][0] != 1


def test_a_space_in_front_is_left_out_where_the_file_says_so(of_pieces: Path, tmp_path: Path) -> None:
    file = rewritten(of_pieces, tmp_path / "own.gguf", extra={"tokenizer.ggml.add_space_prefix": False})
    folder = converted(file, cache=tmp_path / "cache").folder
    gguf_from_checkpoint(Checkpoint.open(folder), tmp_path / "again.gguf")
    fields = gguf.GGUFReader(tmp_path / "again.gguf").fields
    assert not fields["tokenizer.ggml.add_space_prefix"].contents()


def test_a_way_to_cut_without_translation_is_refused_by_name(of_bytes: Path, tmp_path: Path) -> None:
    file = _saying(of_bytes, tmp_path / "other.gguf", "deepseek-coder")
    with pytest.raises(NirvanaError, match=r"says tokenizer\.ggml\.pre = 'deepseek-coder'"):
        converted(file, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
