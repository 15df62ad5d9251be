"""A checkpoint's tokenizer in llama.cpp's words.

Two kinds of ``tokenizer.json`` are known: byte-level BPE ("gpt2" there), and BPE over SentencePiece pieces
with byte fallback ("llama" there), whose merges llama.cpp finds by the scores of the pieces. How byte-level
text is cut into words has a name in llama.cpp; it is found from the pre-tokenizer in the file, never from the
model's name, and an unknown one is refused, since it would silently give other tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Required, TypedDict

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json, read_text, typed
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.gguf.cuts import BY_PATTERN, WHOLE_WORDS_FIRST
from nirvana_deploy.model.text.stops import special_ids, stop_ids

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_HINT = "Deploy the ONNX folder instead: nirvana-deploy export CHECKPOINT --out DIR"
_LONG_AGO = -1e6


def tokenizer_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``tokenizer.*`` keys of a checkpoint with a ``tokenizer.json``.

    Raises NirvanaError for a folder without one, and for a tokenizer that llama.cpp would read otherwise.
    """
    folder = checkpoint.path
    if not (folder / "tokenizer.json").is_file():
        raise NirvanaError(
            f"{folder} has no tokenizer.json, which a GGUF file must contain.",
            hint="Copy the model's tokenizer files into the folder.",
        )
    file = folder / "tokenizer.json"
    tokenizer: dict[str, Any] = read_json(file, dict[str, Any], hint=_HINT)
    kind = typed(tokenizer, _AnyTokenizer, str(file), hint=_HINT)["model"].get("type")
    if kind != "BPE":
        raise NirvanaError(f"A tokenizer of type {kind!r} is not known here; BPE is.", hint=_HINT)
    model = typed(tokenizer, _Tokenizer, str(file), hint=_HINT)["model"]
    pieces, types = _pieces(tokenizer, checkpoint.shape.vocab_size)
    found: dict[str, Any] = {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        **_special_ids(folder, tokenizer, checkpoint.config),
    }
    if model.get("byte_fallback"):
        return found | _sentencepiece(tokenizer, pieces)
    return found | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer_name(tokenizer),
        "tokenizer.ggml.merges": [" ".join(_pair(merge)) for merge in _merges(model)],
    }


class _AnyTokenizer(TypedDict):
    model: dict[str, Any]


class _Bpe(TypedDict, total=False):
    vocab: Required[dict[str, int]]
    merges: Required[list[str | list[str]]]
    unk_token: str | None
    byte_fallback: bool | None
    ignore_merges: bool | None


class _Step(TypedDict, total=False):
    """A pre-tokenizer, normalizer or post-processor, with those of the keys of all kinds that are read."""

    type: Required[str]
    pretokenizers: list[_Step]
    normalizers: list[_Step]
    processors: list[_Step]
    pattern: dict[str, str]
    single: list[dict[str, Any]]


class _AddedToken(TypedDict):
    id: int
    content: str
    special: bool


class _Tokenizer(TypedDict, total=False):
    """What is read of a tokenizer.json with BPE."""

    model: Required[_Bpe]
    added_tokens: list[_AddedToken]
    pre_tokenizer: _Step | None
    normalizer: _Step | None
    post_processor: _Step | None


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for what ``pre_tokenizer`` of a byte-level tokenizer.json does.

    GPT-2's own expression alone is "gpt-2"; after a step that cuts digits one by one it is "smollm" (that is
    what SmolLM's own tokenizer says); the expressions of Llama 3, Qwen2 and Mistral's Tekken are known as
    Split steps. Raises NirvanaError for anything else.
    """
    outer = tokenizer.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", []) if outer.get("type") == "Sequence" else [outer]
    kinds = [step.get("type") for step in steps]
    known = (tokenizer.get("normalizer") or {}).get("type") in (None, "NFC")
    if known and kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        own_words = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own_words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and own_words and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not own_words and steps[0].get("behavior") == "Isolated":
            name = BY_PATTERN.get(steps[0].get("pattern", {}).get("Regex"))
            if name and bool(tokenizer["model"].get("ignore_merges")) == (name in WHOLE_WORDS_FIRST):
                return name
    raise NirvanaError(
        f"The pre-tokenizer of tokenizer.json is not one that llama.cpp knows by name: {outer!r}.", hint=_HINT
    )


def _pieces(tokenizer: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text of every id below V and its kind; ids that no token has are unused padding."""
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    unknown = tokenizer["model"].get("unk_token")
    pieces = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    added = {token["content"]: token for token in tokenizer.get("added_tokens", ())}
    for piece, index in (vocabulary | {text: token["id"] for text, token in added.items()}).items():
        if not 0 <= index < vocab_size:
            raise NirvanaError(
                f"tokenizer.json has a token {piece!r} of id {index}, and the model's vocabulary has "
                f"{vocab_size} rows.",
                hint="The tokenizer is another model's: copy the right one into the checkpoint folder.",
            )
        pieces[index] = piece
        if piece == unknown and tokenizer["model"].get("byte_fallback"):
            types[index] = _UNKNOWN
        elif piece in added:
            types[index] = _CONTROL if added[piece]["special"] else _USER_DEFINED
        elif tokenizer["model"].get("byte_fallback") and _BYTE_PIECE.fullmatch(piece):
            types[index] = _BYTE
        else:
            types[index] = _NORMAL
    return pieces, types


def _merges(model: Mapping[str, Any]) -> list[Any]:
    if not model["merges"]:
        raise NirvanaError(
            "tokenizer.json has no merges, and llama.cpp refuses a BPE without them.", hint=_HINT
        )
    return list(model["merges"])


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Both spellings of a merge: "a b" and ["a", "b"]."""
    halves = merge.split(" ") if isinstance(merge, str) else merge
    if len(halves) != 2:
        raise NirvanaError(f"tokenizer.json has the merge {merge!r}, which is no pair of pieces.", hint=_HINT)
    return halves[0], halves[1]


def _sentencepiece(tokenizer: Mapping[str, Any], pieces: list[str]) -> dict[str, Any]:
    """Scores that make llama.cpp merge in the order of ``merges``: the earlier a piece, the higher."""
    order: dict[str, int] = {}
    for rank, merge in enumerate(_merges(tokenizer["model"])):
        order.setdefault("".join(_pair(merge)), rank)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(order[piece]) if piece in order else _LONG_AGO for piece in pieces],
        "tokenizer.ggml.add_space_prefix": _prefixes_space(tokenizer),
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }


def _prefixes_space(tokenizer: Mapping[str, Any]) -> bool:
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    words = tokenizer.get("pre_tokenizer") or {}
    return any(step.get("type") == "Prepend" for step in steps) or (
        words.get("type") == "Metaspace" and words.get("prepend_scheme") != "never"
    )


def _special_ids(folder: Path, tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of the special tokens, whether one goes before every text, and the chat template."""
    settings = _optional_json(folder / "tokenizer_config.json")
    found: dict[str, Any] = {}
    of_tokenizer, stops = special_ids(folder), list(stop_ids(folder))
    ids: dict[str, Any] = {**config, **{f"{name}_token_id": value for name, value in of_tokenizer.items()}}
    for name, key in (("bos", "bos"), ("pad", "padding"), ("unk", "unknown")):
        if ids.get(f"{name}_token_id") is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = ids[f"{name}_token_id"]
    if of_tokenizer.get("eos") in stops:  # llama.cpp ends texts with the first
        stops.sort(key=lambda stop: stop != of_tokenizer["eos"])
    for name, stop in zip(("eos", "eot", "eom"), stops, strict=False):  # it has no room for more
        found[f"tokenizer.ggml.{name}_token_id"] = stop
    found["tokenizer.ggml.add_bos_token"] = _begins_texts(tokenizer)
    chat = folder / "chat_template.jinja"
    text = read_text(chat) if chat.is_file() else settings.get("chat_template")
    if isinstance(text, str):
        found["tokenizer.chat_template"] = text
    return found


def _begins_texts(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a special token goes before every text, by the template among the post-processors."""
    outer = tokenizer.get("post_processor") or {}
    for step in outer.get("processors", [outer]):
        if template := step.get("single"):
            return "SpecialToken" in template[0]
    return False


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, dict[str, Any]) if path.is_file() else {}
