"""Records of a data set to documents: a text, or a conversation for the model's chat template.

A record that is neither is refused with its fields: which of them is the text is not for us to guess.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.reading import HALF_A_PAIR


@dataclass(frozen=True)
class Conversation:
    """Turns of a chat."""

    turns: tuple[tuple[str, str], ...]
    """(role, content): "system", "user", "assistant", or what the file says."""

    def messages(self) -> list[dict[str, str]]:
        """The turns as a chat template reads them."""
        return [{"role": role, "content": content} for role, content in self.turns]


Document = str | Conversation
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
"""What ShareGPT calls them."""
_CHATS = ("messages", "conversations", "conversation")
_ANSWERS = ("output", "response")
_WANTED = (
    "expected 'text', 'messages' or 'conversations', 'instruction' with 'output', or one text field alone"
)


def json_lines(path: Path, text: str) -> Iterator[Document]:
    """One document per line of JSON; raises NirvanaError, naming the line, for what is none."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield document_of(_parsed(line, where), where)


def json_documents(path: Path, text: str) -> Iterator[Document]:
    """The documents of a JSON list, or of an object whose only list it is; lines of JSON are read as such."""
    if _has_value_per_line(text):
        yield from json_lines(path, text)
        return
    value = _parsed(text, str(path))
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        if len(lists) == 1 and not any(key in value for key in _CHATS):
            (value,) = lists
    for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
        yield document_of(record, f"{path}, record {number}")


def _has_value_per_line(text: str) -> bool:
    """Whether more stands behind the first value, and that ends with its line."""
    try:
        value, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    rest = text.lstrip()[end:]
    return isinstance(value, dict | list) and bool(rest.strip()) and rest.lstrip(" \r").startswith("\n")


def table_documents(path: Path, text: str) -> Iterator[Document]:
    """One document per row of a table with a header, separated by commas or (.tsv) tabs."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(1 << 30)
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator), 1):
            if None in row or None in row.values():
                raise NirvanaError(f"{path}, row {number}: it has not as many fields as the header.")
            yield document_of(row, f"{path}, row {number}")
    except csv.Error as error:
        raise NirvanaError(f"{path} is not a table: {error}.") from error


def parquet_documents(path: Path) -> Iterator[Document]:
    """One document per row of a parquet file; raises MissingExtraError without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("Reading a parquet file", package="pyarrow", extra="data") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise NirvanaError(f"{path} is not a parquet file, or is damaged: {error}.") from error
    yield from (document_of(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1))


def document_of(record: Any, where: str) -> Document:
    """The document of one record, which stands at ``where``; raises NirvanaError, naming its fields."""
    if isinstance(record, str):
        return _whole(record, where)
    if isinstance(record, list):
        return _conversation(record, where)
    if not isinstance(record, dict):
        raise NirvanaError(f"{where}: {_WANTED}, got {json.dumps(record)[:40]}.")
    if "text" in record:
        return _string(record, "text", where)
    for key in _CHATS:
        if key in record:
            return _conversation(record[key], where)
    answer = next((key for key in _ANSWERS if key in record), None)
    if "instruction" in record and answer is not None:
        asked = [_string(record, key, where) for key in ("instruction", "input") if record.get(key)]
        system = [("system", _string(record, "system", where))] if record.get("system") else []
        turns = [*system, ("user", "\n\n".join(asked)), ("assistant", _string(record, answer, where))]
        return Conversation(tuple(turns))
    if len(record) == 1:
        return _string(record, next(iter(record)), where)
    fields = ", ".join(sorted(map(str, record))[:8]) or "none"
    raise NirvanaError(
        f"{where}: {_WANTED}; the fields are: {fields}.",
        hint='Write the texts as lines of JSON, each {"text": "..."}.',
    )


def _conversation(turns: Any, where: str) -> Conversation:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise NirvanaError(f"{where}: a conversation is a list of turns, got {json.dumps(turns)[:40]}.")
    return Conversation(tuple(_turn(turn, where) for turn in turns))


def _turn(turn: Mapping[str, Any], where: str) -> tuple[str, str]:
    for role, content in (("role", "content"), ("from", "value")):
        if role in turn and content in turn:
            said = _string(turn, role, where)
            return _ROLES.get(said, said), _content(turn[content], where)
    raise NirvanaError(
        f"{where}: a turn has 'role' and 'content', or 'from' and 'value'; "
        f"the fields are: {', '.join(sorted(map(str, turn))[:8])}."
    )


def _content(content: Any, where: str) -> str:
    """Text of a turn; parts of text are joined, other parts refused."""
    if isinstance(content, str):
        return _whole(content, where)
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise NirvanaError(f"{where}: a turn holds {json.dumps(content)[:40]}, which is not text alone.")
    return _whole("".join(text for text in texts if isinstance(text, str)), where)


def _string(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise NirvanaError(f"{where}: the field {key!r} is {json.dumps(value, default=str)[:40]}, not text.")
    return _whole(value, where)


def _whole(text: str, where: str) -> str:
    """``text``; JSON can say half a character, which no tokenizer takes."""
    if HALF_A_PAIR.search(text):
        raise NirvanaError(f"{where}: half of a surrogate pair (\\ud8..) is no text.")
    return text


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise NirvanaError(f"{where}: it is nested too deeply.") from None
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "a number of thousands of digits"
        raise NirvanaError(f"{where}: not JSON ({reason}).") from error


def repeated(documents: Iterable[Document]) -> int:
    """How many documents stand there once more."""
    held = [document for document in documents if document]
    return len(held) - len(set(held))
