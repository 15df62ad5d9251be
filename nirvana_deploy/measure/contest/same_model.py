"""Whether several artifacts hold one model, by what their files say: tokenizer, family, width, depth.

A prompt is a list of token ids, so without one vocabulary nothing is compared. Sizes may differ within a
family, as after pruning by another tool; then speeds compare, and what is written does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.model.families import FAMILIES
from nirvana_deploy.model.gguf.reader import described
from nirvana_deploy.runtime.beside import CONFIG, GENAI_CONFIG
from nirvana_deploy.runtime.registry import kind_of

_OTHER_TOKENS = 0.01
"""Share of the ids with another text above which two tokenizers are not the same; below, special tokens
have other names."""
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class ModelFacts:
    """What the files of one artifact say; None, or nothing, where they do not."""

    families: frozenset[str] = frozenset()
    """``model_type`` in config.json; several where an architecture of GGUF stands for several."""
    vocab_size: int | None = None
    hidden_size: int | None = None
    layers: int | None = None
    tokens: Mapping[int, str] | None = None
    """Text by id."""


class _Config(TypedDict, total=False):
    model_type: str
    vocab_size: int | None
    hidden_size: int | None
    num_hidden_layers: int | None


class _GenaiDecoder(TypedDict, total=False):
    hidden_size: int | None
    num_hidden_layers: int | None


class _GenaiModel(TypedDict, total=False):
    type: str
    vocab_size: int | None
    decoder: _GenaiDecoder


class _GenaiConfig(TypedDict, total=False):
    model: _GenaiModel


class _AddedToken(TypedDict, total=False):
    id: int
    content: str


class _Vocabulary(TypedDict, total=False):
    vocab: dict[str, int] | list[Any]


class _Tokenizer(TypedDict, total=False):
    model: _Vocabulary
    added_tokens: list[_AddedToken]


def facts_of(path: Path) -> ModelFacts:
    """Read what an artifact says of its model; raises NirvanaError for a file that cannot be read."""
    kind = kind_of(path)
    if kind == "gguf":
        return _of_gguf(path)
    return ModelFacts() if kind == "engine" else _of_folder(path)


def require_same_model(facts: Mapping[str, ModelFacts]) -> list[str]:
    """Cautions about models of one vocabulary that are not one; ``facts`` by name, the first the reference.

    Raises NirvanaError for another vocabulary, tokenizer or family than the first contender that tells its
    own.
    """
    _require_equal("a vocabulary of {:,} tokens", {name: one.vocab_size for name, one in facts.items()})
    _require_equal("the family {}", {name: one.families or None for name, one in facts.items()})
    _require_tokens({name: one.tokens for name, one in facts.items() if one.tokens})
    cautions = []
    for what, sizes in (
        ("hidden size", {name: one.hidden_size for name, one in facts.items()}),
        ("number of layers", {name: one.layers for name, one in facts.items()}),
    ):
        told = {name: size for name, size in sizes.items() if size is not None}
        if len(set(told.values())) > 1:
            said = ", ".join(f"{size:,} in {name}" for name, size in told.items())
            cautions.append(
                f"These are not the same model: the {what} is {said}. Their speeds compare; what they write "
                "does not."
            )
    return cautions


def not_the_same(reference: str, ours: str, name: str, theirs: str) -> NirvanaError:
    """The refusal of contender ``name`` beside ``reference``."""
    return NirvanaError(
        f"Not the same model: {reference} has {ours}, and {name} has {theirs}.",
        hint="Name artifacts of one model, or time them apart: one benchmark for each.",
    )


def _require_equal(what: str, told: Mapping[str, Any]) -> None:
    (reference, first), *others = [one for one in told.items() if one[1] is not None] or [("", None)]
    for name, value in others:
        same = not first.isdisjoint(value) if isinstance(first, frozenset) else first == value
        if not same:
            raise not_the_same(reference, _said(what, first), name, _said(what, value))


def _said(what: str, value: Any) -> str:
    return what.format(" or ".join(sorted(value)) if isinstance(value, frozenset) else value)


def _require_tokens(told: Mapping[str, Mapping[int, str]]) -> None:
    (reference, first), *others = list(told.items()) or [("", {})]
    for name, tokens in others:
        shared = sorted(first.keys() & tokens.keys())
        other = [number for number in shared if first[number] != tokens[number]]
        if len(other) > _OTHER_TOKENS * len(shared):
            at = other[0]
            ours, theirs = (f"{text[at]!r} as token {at:,}" for text in (first, tokens))
            raise not_the_same(reference, ours, name, theirs)


def _of_gguf(path: Path) -> ModelFacts:
    said = described(path)
    return ModelFacts(
        families=frozenset(
            name for name, one in FAMILIES.items() if one.gguf and one.gguf.name == said.architecture
        ),
        vocab_size=len(said.tokens) or None,
        hidden_size=said.hidden_size,
        layers=said.layers,
        tokens=dict(enumerate(said.tokens)) or None,
    )


def _of_folder(folder: Path) -> ModelFacts:
    config: _Config = {}
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG, _Config)
    elif (folder / GENAI_CONFIG).is_file():
        model = read_json(folder / GENAI_CONFIG, _GenaiConfig).get("model", {})
        decoder = model.get("decoder", {})
        config = {
            "model_type": model.get("type", ""),
            "vocab_size": model.get("vocab_size"),
            "hidden_size": decoder.get("hidden_size"),
            "num_hidden_layers": decoder.get("num_hidden_layers"),
        }
    family = config.get("model_type")
    return ModelFacts(
        families=frozenset([family] if family in FAMILIES else []),
        vocab_size=config.get("vocab_size"),
        hidden_size=config.get("hidden_size"),
        layers=config.get("num_hidden_layers"),
        tokens=_tokens(folder / _TOKENIZER),
    )


def _tokens(file: Path) -> dict[int, str] | None:
    """The vocabulary in tokenizer.json, whether it is a table of ids or a list of pieces with scores."""
    if not file.is_file():
        return None
    tokenizer = read_json(file, _Tokenizer)
    vocab = tokenizer.get("model", {}).get("vocab", {})
    found = (
        dict(_pairs(vocab)) if isinstance(vocab, list) else {number: text for text, number in vocab.items()}
    )
    return found | {one["id"]: one["content"] for one in tokenizer.get("added_tokens", ())}


def _pairs(pieces: Sequence[Any]) -> list[tuple[int, str]]:
    return [(number, str(piece[0])) for number, piece in enumerate(pieces)]
