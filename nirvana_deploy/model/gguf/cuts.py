"""How llama.cpp cuts text into words, by the names that it has for it.

A GGUF file names the way alone (``tokenizer.ggml.pre``), and a wrong one silently gives other tokens.
Source: ``llm_tokenizer_bpe`` and ``llama_vocab::impl::load`` in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.model.gguf.reader import text_field

_NUMBERS_OF = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
BY_PATTERN = {
    _NUMBERS_OF % "{1,3}": "llama-bpe",
    _NUMBERS_OF % "": "qwen2",
    _CASED % ("", "", ""): "tekken",
}
"""How a Split step cuts text -> the name that is written for it."""
_LLAMA3 = {
    *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "jina-v5-nano",
}
WHOLE_WORDS_FIRST = _LLAMA3 | {"tekken"}
"""Names under which llama.cpp takes a word that is a token without merging (``ignore_merges``), and begins
texts with the first token where the file does not say whether to."""
_AS_GPT2 = {
    *("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum"),
    *("modern-bert", "mpt", "olmo", "jais", "trillion", "granite-docling"),
}
_DIGITS_FIRST = {
    *("smollm", "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
}
_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_LLAMA3 | {"dbrx", "smaug-bpe"}, (_NUMBERS_OF % "{1,3}",)),
    **dict.fromkeys(
        {"qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"},
        (_NUMBERS_OF % "",),
    ),
    "tekken": (_CASED % ("", "", ""),),
    **dict.fromkeys({"gpt-4o", "llama4", "kanana2", "talkie"}, (_CASED % (_ENDINGS, _ENDINGS, "{1,3}"),)),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
"""Name -> the expressions that cut text one after the other."""


def read_as_llama_cpp(tokenizer: Any, reader: Any) -> None:
    """Change a tokenizer that transformers made of a GGUF file to what llama.cpp does with the file.

    ``reader`` is gguf's of that file. Byte-level text is cut as the file says, by llama.cpp's default where
    it says nothing; pieces of SentencePiece get a space in front unless it says otherwise. Raises
    NirvanaError for a way to cut that has no translation.
    """
    backend, kind = tokenizer.backend_tokenizer, text_field(reader, "tokenizer.ggml.model")
    if kind == "gpt2":
        name = text_field(reader, "tokenizer.ggml.pre") or "default"
        backend.pre_tokenizer = _pre_tokenizer(name)
        backend.model.ignore_merges = name in WHOLE_WORDS_FIRST
        if name in WHOLE_WORDS_FIRST and reader.get_field("tokenizer.ggml.add_bos_token") is None:
            tokenizer.add_bos_token = True
    elif kind == "llama":
        prefix = reader.get_field("tokenizer.ggml.add_space_prefix")
        _prepend_space(backend, always=prefix is None or bool(prefix.contents()))


def drop_strangers(tokenizer_json: Path, tokens: int) -> None:
    """Take the added tokens that a GGUF file of so many ``tokens`` lacks out of the file made of it.

    transformers adds GPT-2's end of text to every byte-level vocabulary, and then its id has no row.
    """
    tokenizer = read_json(tokenizer_json, dict[str, Any])
    tokenizer["added_tokens"] = [one for one in tokenizer["added_tokens"] if one["id"] < tokens]
    tokenizer_json.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")


def _pre_tokenizer(name: str) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if name in _AS_GPT2:
        return ByteLevel(add_prefix_space=False)
    if name in _DIGITS_FIRST:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name not in _SPLITS:
        raise NirvanaError(
            f"Unsupported: the GGUF file says tokenizer.ggml.pre = {name[:60]!r}, "
            "a way to cut text into words that this tool has no translation for.",
            hint="Pass the Hugging Face folder of the model instead.",
        )
    splits = [Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[name]]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _prepend_space(backend: Any, *, always: bool) -> None:
    """Put a space in front of a text, and behind a special token, though one is there already, or never."""
    from tokenizers import decoders
    from tokenizers.normalizers import Prepend, Replace, Sequence

    spaces = Replace(" ", "▁")
    if isinstance(backend.normalizer, Replace):  # a Gemma's, which prepends none
        return
    backend.normalizer = Sequence([Prepend("▁"), spaces]) if always else spaces
    backend.pre_tokenizer = None
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*pieces, *([decoders.Strip(" ", 1, 0)] if always else [])])
