"""Calibration text from the package, this Python, a named set on the hub, or a user's file."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nirvana_deploy.calib_sets as calib_sets
from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.calibrate.files.reading import file_documents
from nirvana_deploy.calibrate.files.records import Conversation, repeated
from nirvana_deploy.calibrate.standard_library import standard_library_documents
from nirvana_deploy.model.hub import NETWORK_ERRORS
from nirvana_deploy.model.text.chat import written_out

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


def known_sources() -> tuple[str, ...]:
    """The names of sources that are no files."""
    return ("self", "prose", "pydoc", "code", *calib_sets.names())


def name_of_text(source: str) -> str:
    """The name that the text of a source has in records: a file's is "file notes.txt"."""
    return source if source in known_sources() else _name_of_file(Path(source))


def _name_of_file(path: Path) -> str:
    return f"file {path.name}"


def is_at_hand(source: str) -> bool:
    """Whether it is read without a network and without the model."""
    return source != "self" and source not in calib_sets.names()


def require_source(source: str, tokenizer: Any) -> None:
    """Raise what :func:`read_source` would raise for a file or an unknown name, without a network."""
    if source not in known_sources():
        read_source(source, tokenizer=tokenizer)


def read_source(source: str, *, tokenizer: Any = None, progress: Progress = SILENT) -> SourceText:
    """Read "prose", "pydoc", "code", a name in calib_sets/, or a file as :func:`read_text_file` does."""
    readers: dict[str, Callable[[], tuple[str, ...]]] = {
        "prose": calib_sets.prose,
        "pydoc": _pydoc_documents,
        "code": standard_library_documents,
        **{name: functools.partial(_hub_documents, name, progress) for name in calib_sets.names()},
    }
    path = Path(source).expanduser()
    if source not in readers and (path.exists() or path.suffix or path.name != source):
        return read_text_file(path, tokenizer=tokenizer, progress=progress)
    hint = "Or 'self', 'mix', or a file of text. A share is a number after the name: pydoc:0.7,code:0.3."
    read = look_up(source, readers, what="calibration source", hint=hint)
    return SourceText(source, read())


def read_text_file(path: Path, *, tokenizer: Any = None, progress: Progress = SILENT) -> SourceText:
    """Read a text, or a data set with one document per record (:mod:`~nirvana_deploy.calibrate.files`).

    Conversations are written out by the chat template of ``tokenizer``. Raises NirvanaError for what holds no
    text, and for conversations without a template.
    """
    documents = file_documents(path)
    if count := repeated(documents):
        progress.note(f"{path.name} repeats itself: {count:,} of {len(documents):,} documents stand twice")
    chats = [document for document in documents if isinstance(document, Conversation)]
    if chats and not getattr(tokenizer, "chat_template", None):
        raise NirvanaError(
            f"{path} holds conversations, and the model's tokenizer has no chat template to write them out.",
            hint='Choose the chat version of the model, or write plain texts: {"text": "..."} per line.',
        )
    written = iter(written_out(tokenizer, [chat.messages() for chat in chats]) if chats else ())
    texts = tuple(document if isinstance(document, str) else next(written) for document in documents)
    return SourceText(_name_of_file(path), texts)


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
            hint="Without a network: --calib prose, --calib self, or --calib FILE.",
        ) from error
    return tuple(texts) if definition.joined_by is None else (definition.joined_by.join(texts),)
