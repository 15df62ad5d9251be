"""The ids that end an answer, special tokens and sampling settings of a folder: one rule for every consumer.

generation_config.json, config.json and the tokenizer each may name stop ids, and folders on the hub name
different ones in each: any of them ends an answer. What none names counts as the config class says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json

GENERATION_CONFIG = "generation_config.json"
_SAMPLING: dict[str, type] = {
    "do_sample": bool,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
}
"""Keys of generation_config.json that every consumer knows, and the types of their values."""


def stop_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end an answer, the model's own first; raises NirvanaError for what is no token id."""
    named = [
        *_ids(folder / GENERATION_CONFIG, "eos_token_id"),
        *_ids(folder / "config.json", "eos_token_id"),
        *_ids(folder / "genai_config.json", "model", "eos_token_id"),
        *_listed(special_ids(folder).get("eos")),
    ]
    if not named and (folder / "config.json").is_file():
        named = _listed(_of_class(read_json(folder / "config.json")).get("eos_token_id"))
    return tuple(dict.fromkeys(named))


def require_settings(folder: Path) -> None:
    """Raise NirvanaError for stop ids and sampling settings of another type."""
    sampling_settings(folder)
    for name in ("config.json", GENERATION_CONFIG):
        _ids(folder / name, "eos_token_id")


def begin_and_pad(folder: Path) -> tuple[int | None, int | None]:
    """The ids before a text and for padding, None where nothing names them."""
    of_tokenizer = special_ids(folder)
    found = []
    for name in ("bos", "pad"):
        key = f"{name}_token_id"
        named = [
            *_ids(folder / "config.json", key),
            *_ids(folder / GENERATION_CONFIG, key),
            *_listed(of_tokenizer.get(name)),
        ]
        found.append(named[0] if named else None)
    return found[0], found[1]


def sampling_settings(folder: Path) -> dict[str, bool | int | float]:
    """How the model's author samples, by generation_config.json, as far as it says."""
    path = folder / GENERATION_CONFIG
    given = _object(path)
    found = {}
    for key, kind in _SAMPLING.items():
        value = given.get(key)
        if value is None:
            continue
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, int | float):
            raise NirvanaError(f"{path}: {key!r} must be a {kind.__name__}, got {value!r}.")
        found[key] = kind(value)
    return found


def special_ids(folder: Path) -> dict[str, int]:
    """The ids of "bos", "eos", "pad" and "unk" by the tokenizer's files, of those that it has."""
    tokenizer = _object(folder / "tokenizer.json")
    settings = _object(folder / "special_tokens_map.json") | _object(folder / "tokenizer_config.json")
    model = tokenizer.get("model")
    pieces = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(pieces) if isinstance(pieces, dict) else {}
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            ids[token["content"]] = token.get("id")
    found = {}
    for name in ("bos", "eos", "pad", "unk"):
        token = settings.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content is not None and not isinstance(content, str):
            raise NirvanaError(
                f"{folder / 'tokenizer_config.json'}: '{name}_token' is {str(content)[:60]}, not a text."
            )
        if isinstance(content, str) and isinstance(ids.get(content), int):
            found[name] = ids[content]
    return found


def _ids(path: Path, *keys: str) -> list[int]:
    """The ids under a key of a JSON file; none where the file or the key is missing or null."""
    value: Any = _object(path)
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    ids = _listed(value)
    for number in ids:
        if type(number) is not int or number < 0:
            raise NirvanaError(f"{path}: {keys[-1]!r} must be token ids, got {value!r}.")
    return ids


def _object(path: Path) -> dict[str, Any]:
    if not path.exists() and not path.is_symlink():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise NirvanaError(f"{path} must hold an object, got {str(value)[:40]}.")
    return value


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _of_class(config: Mapping[str, Any]) -> dict[str, Any]:
    from nirvana_deploy.model.config import completed  # imports transformers
    from nirvana_deploy.model.families import family_of

    return completed(config, family_of(config))
