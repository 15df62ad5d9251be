"""Calibration text from this Python, a named set on the hub, or a user's file."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nirvana_deploy.calib_sets as calib_sets
from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import HALF_A_PAIR, read_text
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.calibrate.standard_library import standard_library_documents
from nirvana_deploy.model.hub import NETWORK_ERRORS

# What `datasets` raises without a network, or for an unknown data set or split.
_READ_ERRORS: tuple[type[Exception], ...] = (*NETWORK_ERRORS, ValueError, RuntimeError)


@dataclass(frozen=True)
class SourceText:
    """The documents of one source."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the documents in UTF-8, joined by a zero byte."""
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()


def read_source(source: str, *, progress: Progress = SILENT) -> SourceText:
    """Read "pydoc", "code", a name in calib_sets/, or a text or .jsonl file."""
    readers: dict[str, Callable[[], tuple[str, ...]]] = {
        "pydoc": _pydoc_documents,
        "code": standard_library_documents,
        **{name: functools.partial(_hub_documents, name, progress) for name in calib_sets.names()},
    }
    path = Path(source).expanduser()
    if source not in readers and (path.exists() or path.suffix or path.name != source):
        return read_text_file(path)
    hint = (
        "Or 'self', 'mix', or a text or .jsonl file. A share is a number after the name: pydoc:0.7,code:0.3."
    )
    read = look_up(source, readers, what="calibration source", hint=hint)
    return SourceText(source, read())


def read_text_file(path: Path) -> SourceText:
    """Read a UTF-8 text file as one document, or a .jsonl file as one document per line.

    A line of JSON gives its field "text", else its only string field. Raises NirvanaError for a file that is
    missing, empty, not UTF-8 (with the byte offset) or not JSONL (with the line).
    """
    text = read_text(path, hint="Give a text or .jsonl file.")
    documents = tuple(_jsonl_documents(path, text)) if path.suffix == ".jsonl" else (text,)
    if not any(document.strip() for document in documents):
        raise NirvanaError(f"{path} is empty: it holds no text.")
    return SourceText(f"file {path.name}", documents)


def _jsonl_documents(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # digits or brackets by the thousand
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply, or huge"
            raise NirvanaError(f"{path}, line {number}: not JSON ({reason}).") from error
        strings = {k: v for k, v in record.items() if isinstance(v, str)} if isinstance(record, dict) else {}
        if "text" not in strings and len(strings) != 1:
            raise NirvanaError(
                f"{path}, line {number}: expected an object with the field 'text' or one string field only, "
                f"got {f'string fields {sorted(strings)}' if strings else f'{line[:40]!r}'}."
            )
        found = strings.get("text", next(iter(strings.values())))
        if HALF_A_PAIR.search(found):
            raise NirvanaError(f"{path}, line {number}: half of a surrogate pair (\\ud8..) is no text.")
        yield found


def _pydoc_documents() -> tuple[str, ...]:
    """Topics of the language reference inside every CPython; they differ between versions."""
    from pydoc_data.topics import topics

    return tuple(topics[name] for name in sorted(topics))


def _hub_documents(name: str, progress: Progress) -> tuple[str, ...]:
    """The first rows of a named set, read with ``datasets``."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtraError(f"The calibration set {name!r}", package="datasets", extra="data") from None
    definition = calib_sets.load(name)
    progress.note(f"Reading {definition.rows:,} rows of {definition.dataset} (licence: {definition.licence})")
    try:
        rows = load_dataset(
            definition.dataset, definition.config, split=definition.split, streaming=definition.streaming
        )
        texts = [row[definition.text_field] for row in itertools.islice(rows, definition.rows)]
    except _READ_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NirvanaError(
            f"The calibration set {name!r} ({definition.dataset} on the hub) cannot be read: {reason}",
            hint="Without a network: --calib pydoc, --calib self, or --calib FILE.",
        ) from error
    return tuple(texts) if definition.joined_by is None else (definition.joined_by.join(texts),)
