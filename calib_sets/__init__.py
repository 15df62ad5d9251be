"""Calibration text: named sets on the hub, one TOML file each, and ``prose``, which comes with the package.

``prose/`` holds English of many kinds, written for this purpose: reference works, news, the web, fiction,
learning, technical text. A file is a kind; lines of five equals signs stand between its documents.
``unseen/`` holds narrative history of science and engineering: a kind that is no source, so that quality can
be measured on it.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest

from nirvana_deploy.base.registry import look_up

_BETWEEN_DOCUMENTS = "\n=====\n"


@dataclass(frozen=True)
class CalibSet:
    """A calibration set on the Hugging Face hub."""

    dataset: str
    """Dataset id on the hub."""
    config: str
    split: str
    text_field: str
    licence: str
    rows: int
    """How many rows are read, from the first: enough for any usual N x T, little to download."""
    streaming: bool
    """Read the first rows over the network instead of downloading the whole split."""
    joined_by: str | None = None
    """Where rows are lines or sentences of one text: what stands between them. None: a row is a document."""


def names() -> tuple[str, ...]:
    """The names of all sets, sorted."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def load(name: str) -> CalibSet:
    """The definition called ``name``; raises NirvanaError ("did you mean") for an unknown name."""
    file = look_up(name, {known: f"{known}.toml" for known in names()}, what="calibration set")
    return CalibSet(**tomllib.loads((resources.files(__name__) / file).read_text(encoding="utf-8")))


def prose() -> tuple[str, ...]:
    """The documents of ``prose``, the kinds by turns, so that a part of them has something of each."""
    return _documents_of("prose")


def unseen() -> tuple[str, ...]:
    """The documents that no source has: quality is measured on them, nothing is calibrated or trained."""
    return _documents_of("unseen")


def _documents_of(name: str) -> tuple[str, ...]:
    """The documents in the files of a folder, the files by turns."""
    folder = resources.files(__name__) / name
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".txt")), key=lambda file: file.name
    )
    kinds = [file.read_text(encoding="utf-8").split(_BETWEEN_DOCUMENTS) for file in files]
    return tuple(text.strip() for turn in zip_longest(*kinds, fillvalue="") for text in turn if text.strip())
