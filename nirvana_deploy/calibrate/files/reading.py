"""A user's text file as documents, by its first bytes and its suffix in any letter case."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import require_file
from nirvana_deploy.calibrate.files.decoding import PARQUET, decoded, unpacked
from nirvana_deploy.calibrate.files.records import (
    Document,
    json_documents,
    json_lines,
    parquet_documents,
    table_documents,
)

_BY_SUFFIX: dict[str, Callable[[Path, str], Iterable[Document]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_documents,
    ".csv": table_documents,
    ".tsv": table_documents,
}


def file_documents(path: Path) -> tuple[Document, ...]:
    """The documents of a file: lines or lists of JSON, tables, parquet; else the whole text as one.

    Compressed files (gzip, bzip2, xz) are read as what they hold. Raises NirvanaError for a file that is
    missing, empty, of another kind (named), not decodable (with the offset) or not as its kind says (with
    the line), MissingExtraError for parquet without pyarrow.
    """
    require_file(path)
    data = path.read_bytes()
    if data.startswith(PARQUET):
        return _some(path, parquet_documents(path))
    name, data = unpacked(path, data)
    if data.startswith(PARQUET):
        raise NirvanaError(f"{path} is a compressed parquet file.", hint="Unpack it first.")
    text = decoded(name, data)
    read = _BY_SUFFIX.get(name.suffix.lower()) or _by_content(text)
    return _some(path, (text,) if read is None else read(name, text))


def _by_content(text: str) -> Callable[[Path, str], Iterable[Document]] | None:
    """How to read JSON under another suffix; None for a plain text, which may begin with a bracket too."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    for candidate, read in ((text, json_documents), (text.lstrip().partition("\n")[0], json_lines)):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        records = value if isinstance(value, list) else [value]
        return read if all(isinstance(record, dict | list) for record in records) else None
    return None


def _some(path: Path, found: Iterable[Document]) -> tuple[Document, ...]:
    documents = tuple(found)
    if not any(document.strip() if isinstance(document, str) else document for document in documents):
        raise NirvanaError(f"{path} is empty: it holds no text.")
    return documents
