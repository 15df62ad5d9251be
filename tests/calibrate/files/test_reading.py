"""Whatever a user calls a text: read as what it is, or refused with its kind or its fields."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.tiny import write_tokenizer
from transformers import AutoTokenizer

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.files.reading import file_documents
from nirvana_deploy.calibrate.files.records import Conversation
from nirvana_deploy.calibrate.segments import Segments
from nirvana_deploy.calibrate.texts import read_text_file

LINE = "Rivers carry water to the sea."
CHAT = Conversation((("user", "Where to?"), ("assistant", LINE)))
TEXTS = [{"text": "one", "id": 1}, {"text": "two", "id": 2}]
LINES = "\n\n".join(map(json.dumps, TEXTS))
SHAREGPT = [{"from": "human", "value": "Where to?"}, {"from": "gpt", "value": LINE}]
PARTS = [{"type": "text", "text": "Where "}, {"type": "text", "text": "to?"}]
READ: list[tuple[str, str | bytes, tuple[object, ...]]] = [
    ("plain.txt", LINE, (LINE,)),
    ("bracket.md", "[1] Rivers\nand seas", ("[1] Rivers\nand seas",)),
    ("texts.JSONL", LINES, ("one", "two")),
    ("texts.ndjson", LINES, ("one", "two")),
    ("lines.json", LINES, ("one", "two")),
    ("lines.txt", LINES, ("one", "two")),
    ("list.JSON", json.dumps(TEXTS, indent=1), ("one", "two")),
    ("inside.json", json.dumps({"version": 1, "data": TEXTS}), ("one", "two")),
    ("strings.json", json.dumps(["one", "two"]), ("one", "two")),
    ("alone.jsonl", '{"body": "one"}', ("one",)),
    ("t.csv", 'id,text\n1,"one, with\na comma"\n2,two\n', ("one, with\na comma", "two")),
    ("t.tsv", "text\tid\none\t1\n", ("one",)),
    ("t.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), ("one", "two")),
    ("t.txt.bz2", bz2.compress(LINE.encode()), (LINE,)),
    ("unnamed", lzma.compress(LINES.encode()), ("one", "two")),
    ("wide.txt", "naïve, 東京".encode("utf-16"), ("naïve, 東京",)),
    ("wide.jsonl", LINES.encode("utf-16-be"), ("one", "two")),
    ("wider.txt", LINE.encode("utf-32"), (LINE,)),
    (
        "openai.jsonl",
        json.dumps({"messages": [{"role": r, "content": c} for r, c in CHAT.turns], "id": 3}),
        (CHAT,),
    ),
    (
        "sharegpt.json",
        json.dumps([{"id": "a", "conversations": SHAREGPT}]),
        (CHAT,),
    ),
    ("alpaca.json", json.dumps([{"instruction": "Where to?", "input": "", "output": LINE}]), (CHAT,)),
    (
        "parts.jsonl",
        json.dumps([{"role": "user", "content": PARTS}, {"role": "assistant", "content": LINE}]),
        (CHAT,),
    ),
]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(("name", "content", "documents"), READ, ids=lambda value: str(value)[:20])
def test_a_file_is_read_as_what_it_is(
    name: str, content: str | bytes, documents: tuple[object, ...], tmp_path: Path
) -> None:
    assert file_documents(write(tmp_path, name, content)) == documents


def test_parquet_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", "two"], "id": [1, 2]}), tmp_path / "t.bin")
    assert file_documents(tmp_path / "t.bin") == ("one", "two")
    whole = (tmp_path / "t.bin").read_bytes()
    with pytest.raises(NirvanaError, match="not a parquet file, or is damaged"):
        file_documents(write(tmp_path, "cut.parquet", whole[: len(whole) // 2]))


REFUSED: list[tuple[str, str | bytes, str]] = [
    ("a.jsonl", '{"text": "fine"}\n{not json', "line 2: not JSON"),
    ("b.jsonl", '{"text": "fine"}\n{"a": "x", "b": "y"}', r"line 2: .*the fields are: a, b\."),
    ("c.jsonl", '{"a": 1}', "line 1: the field 'a' is 1, not text"),
    ("d.jsonl", '{"body": "two", "id": 3}', r"the fields are: body, id\."),
    ("b2.jsonl", '{"text": "a\\ud800"}', "line 1: half of a surrogate pair"),
    ("b3.jsonl", "[" * 100_000, "line 1: it is nested too deeply"),
    ("b4.jsonl", "1" * 5000, "a number of thousands of digits"),
    ("e.jsonl", '{"text": null}', "the field 'text' is null, not text"),
    ("f.jsonl", '{"messages": []}', "a conversation is a list of turns"),
    ("g.jsonl", '{"messages": [{"role": "user"}]}', "a turn has 'role' and 'content'.*are: role"),
    (
        "h.jsonl",
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
        "which is not text alone",
    ),
    ("i.json", "[" * 100_000, "nested too deeply"),
    ("j.csv", "id,title\n1,x\n", r"row 1: .*the fields are: id, title\."),
    ("k.csv", "text,id\na\n", "row 1: it has not as many fields as the header"),
    ("l.txt", b"\x28\xb5\x2f\xfd\x00", "compressed by zstd"),
    ("m.docx", b"PK\x03\x04rest", "a zip archive"),
    ("n.txt", b"%PDF-1.7", "a PDF document"),
    ("o.gz", gzip.compress(b"text", mtime=0)[:-6], "cannot be unpacked"),
    ("p.txt", b"\x7fELF\x02\x00\x00some\x00\x00", "is not a text: .*is a zero"),
    ("q.txt", b"caf\xe9", "not UTF-8: byte 0xe9 at offset 3"),
    ("r.gz", gzip.compress(b"  \n", mtime=0), "is empty"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_is_no_text_is_named(name: str, content: str | bytes, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=sentence):
        file_documents(write(tmp_path, name, content))


def test_conversations_are_written_out_by_the_models_template(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    name, content, _ = next(entry for entry in READ if entry[0] == "sharegpt.json")
    path = write(tmp_path, name, content)
    with pytest.raises(NirvanaError, match=r"holds conversations, and .* no chat template"):
        read_text_file(path, tokenizer=tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    text = read_text_file(path, tokenizer=tokenizer)
    assert text.documents == (tokenizer.apply_chat_template(CHAT.messages(), tokenize=False),)


def test_held_out_windows_are_no_copies_of_calibration_text() -> None:
    fresh = np.random.default_rng(0).integers(0, 10**6, 5 * 4 * 64)
    segments = Segments(length=2 * len(fresh), seq_len=64, heldout_len=64)
    whole = segments.spread_heldout(np.concatenate([fresh, fresh + 10**6]), 8, source="t")
    assert len(whole) == 8
    twice = np.concatenate([fresh, np.roll(fresh, 64)])  # what one half holds out calibrates in the other
    with pytest.raises(NirvanaError, match=r"t repeats itself: [1-8] of its 8 held-out windows"):
        segments.spread_heldout(twice, 8, source="t")
    [start, other] = segments.spread_heldout(np.concatenate([fresh, fresh + 10**6]), 2, source="t")
    copied = np.concatenate([fresh, fresh + 10**6])
    copied[start : start + 64] = copied[:64]
    replaced = segments.spread_heldout(copied, 2, source="t")
    assert start not in replaced and other in replaced
