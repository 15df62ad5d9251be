"""What the files beside a graph say of its model: genai_config.json, or else config.json."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from nirvana_deploy.base.reading import read_json

GENAI_CONFIG, CONFIG = "genai_config.json", "config.json"


class _Model(TypedDict, total=False):
    context_length: int | None


class _Search(TypedDict, total=False):
    past_present_share_buffer: bool


class _GenaiConfig(TypedDict, total=False):
    model: _Model
    search: _Search


class _Config(TypedDict, total=False):
    max_position_embeddings: int | None


def context_tokens(folder: Path) -> int | None:
    """The longest sequence that the model was made for; None where neither file says it."""
    if (folder / GENAI_CONFIG).is_file():
        return _genai(folder).get("model", {}).get("context_length")
    return _config(folder).get("max_position_embeddings")


def shares_buffers(folder: Path) -> bool:
    """Whether past and present may be one buffer."""
    return _genai(folder).get("search", {}).get("past_present_share_buffer", False)


def _genai(folder: Path) -> _GenaiConfig:
    path = folder / GENAI_CONFIG
    return read_json(path, _GenaiConfig) if path.exists() else {}


def _config(folder: Path) -> _Config:
    path = folder / CONFIG
    return read_json(path, _Config) if path.exists() else {}
