"""What was written is read back; anything else is a sentence: file, key, value, and what is allowed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
import pytest
from builders.unix import named_pipe
from safetensors.numpy import save

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import (
    parse_json,
    read_bytes,
    read_json,
    read_tensors,
    read_text,
    read_toml,
    typed,
)


@dataclass(frozen=True)
class Cut:
    layer: int
    kept: tuple[int, ...]
    share: float | None = None


class Record(TypedDict, total=False):
    name: Required[str]
    cuts: dict[str, Cut]
    pair: tuple[int, int]
    counts: dict[str, dict[str, int]]


def refusal(of: Callable[[], object]) -> str:
    with pytest.raises(NirvanaError) as refused:
        of()
    assert len(refused.value.message.splitlines()) == 1
    return refused.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not valid JSON: Expecting value: line 1 column 1"),
        ('{"layers": [1', "is not valid JSON: Expecting ',' delimiter"),
        ('{"a": 1, "b": {"a": 2, "c": 3, "a": 4}}', 'the key "a" stands twice in one object'),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": [-Infinity]}', "-Infinity is no number"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "a number of thousands of digits"),
        ("[" * 100_000, "is not read: it is nested too deeply"),
        ('{"a":' * 100_000, "is not read: it is nested too deeply"),
        (b'{"a": "\xff"}', "byte 0xff at offset 7 is not UTF-8"),
        (b"\x00" * 4096, "is not valid JSON"),
    ],
)
def test_what_is_not_json_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    message = refusal(lambda: read_json(path))
    assert message.startswith(str(path)) and said in message


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "it is a list of 0, not an object"),
        (7, "it is 7, not an object"),
        ({}, "it has no 'name'"),
        ({"name": None}, "name is null, not a text"),
        ({"name": "m", "cuts": []}, "cuts is a list of 0, not an object"),
        ({"name": "m", "cuts": "\ud800"}, "'\\ud800' in it is no whole character"),
        ({"name": "m", "cuts": {"a": {"layer": 0}}}, "cuts.a has no 'kept'"),
        (
            {"name": "m", "cuts": {"a": {"layer": True, "kept": []}}},
            "cuts.a.layer is true, not a whole number",
        ),
        (
            {"name": "m", "cuts": {"a": {"layer": 0, "kept": [0, True]}}},
            "cuts.a.kept[1] is true, not a whole",
        ),
        (
            {"name": "m", "cuts": {"a": {"layer": 0, "kept": [1.0]}}},
            "cuts.a.kept[0] is 1.0, not a whole number",
        ),
        (
            {"name": "m", "cuts": {"a": {"layer": 0, "kept": []}, "b.[x]": {"layer": "1", "kept": []}}},
            'cuts.b.[x].layer is "1", not a whole number',
        ),
        (
            {"name": "m", "cuts": {"a": {"layer": 0, "kept": [], "share": "half"}}},
            'cuts.a.share is "half", not a number or null',
        ),
        ({"name": "m", "cuts": {"a": {"layer": 0, "kept": [], "share": 10**400}}}, "cuts.a.share is 1000000"),
        ({"name": "m", "pair": [1]}, "pair is a list of 1: expected a list of length 2, got 1"),
        (
            {"name": "m", "counts": {"a": {"x": 1}, "b": {"x": 1, "y": None}}},
            "counts.b.y is null, not a whole",
        ),
    ],
)
def test_what_is_of_another_type_is_named(value: Any, said: str) -> None:
    assert refusal(lambda: typed(value, Record, "record.json")).startswith(f"record.json: {said}")


def test_a_typed_dict_keeps_what_it_does_not_name() -> None:
    value = {"name": "m", "pair": [1, 2], "later": {"x": 1}}
    assert typed(value, Record, "record.json") is value


@pytest.mark.parametrize("found", [2, None, "1", True, 1.0])
def test_another_schema_is_refused(tmp_path: Path, found: object) -> None:
    write_json(tmp_path / "r.json", {"schema": found, "name": "m"})
    with pytest.raises(NirvanaError, match=rf"has schema {found!r}; this version reads schema 1\.\ngit"):
        read_json(tmp_path / "r.json", Record, schema=1)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_dangling_link(path: Path) -> None:
    path.symlink_to("gone")


def make_circle(path: Path) -> None:
    path.symlink_to(path.name)


def make_endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_folder, "it is a folder, not a file"),
        (named_pipe, "it is a pipe or a device, not a file"),
        (make_dangling_link, "it is a link to gone, which does not exist"),
        (make_circle, "too many levels of symbolic links"),
        (make_endless, "1,099,511,627,776 bytes"),
    ],
)
@pytest.mark.parametrize("read", [read_bytes, read_json, read_toml])
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], said: str, read: Callable[[Path], object]
) -> None:
    make(tmp_path / "r")
    assert said in refusal(lambda: read(tmp_path / "r"))


def test_a_device_is_not_read() -> None:
    assert "a pipe or a device" in refusal(lambda: read_json(Path("/dev/zero")))


@pytest.mark.parametrize(("name", "said"), [("x" * 300, "file name too long"), ("a\0b", "null byte")])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str, said: str) -> None:
    assert said in refusal(lambda: read_json(tmp_path / name))


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nirvana_deploy.base.reading.os.open", refuse)
    assert refusal(lambda: read_json(tmp_path / "r")).endswith("r cannot be read: permission denied.")


def test_a_text_comes_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(tmp_path / "t.txt") == "one\ntwo"


def test_what_is_no_text_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named_pipe(tmp_path / "pipe")  # opening it would wait for a writer
    assert "a pipe or a device" in refusal(lambda: read_text(tmp_path / "pipe"))
    assert "a folder, not a file" in refusal(lambda: read_text(tmp_path))
    (tmp_path / "t.txt").write_bytes(b"abc\xe9")
    assert "byte 0xe9 at offset 3" in refusal(lambda: read_text(tmp_path / "t.txt"))

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("nirvana_deploy.base.reading.io.TextIOWrapper", no_memory)
    assert "does not fit into memory: it has 4 bytes" in refusal(lambda: read_text(tmp_path / "t.txt"))


def test_numbers_that_json_has_not_are_written_as_null(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    assert read_json(tmp_path / "r.json") == {"a": [None, 1.5], "b": {"c": None}}


def test_a_name_that_is_not_utf8_comes_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"mod\xe9l")
    write_json(tmp_path / "r.json", {"path": name})
    assert (
        read_json(tmp_path / "r.json") == {"path": name} and b"\\udce9" in (tmp_path / "r.json").read_bytes()
    )


def test_toml_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("a = 1\n[b]\nc = [1, 2]")
    assert read_toml(path) == {"a": 1, "b": {"c": [1, 2]}}
    for text in ("a = ", "a = 1\na = 2", "a = " + "[" * 100_000):
        path.write_text(text)
        assert str(path) in refusal(lambda: read_toml(path))


def test_tensors_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    whole = save({"x": np.arange(4)}, metadata={"about": "1"})
    path.write_bytes(whole)
    tensors, about = read_tensors(path)
    assert tensors["x"].tolist() == [0, 1, 2, 3] and about == {"about": "1"}
    for content in (b"", b"theirs", whole[:-1], whole[:40], b"\xff" * 64, whole.replace(b'"I64"', b'"F8_"')):
        path.write_bytes(content)
        assert str(path) in refusal(lambda: read_tensors(path))
    path.unlink()
    named_pipe(path)
    assert "a pipe or a device" in refusal(lambda: read_tensors(path))


def test_a_line_is_named_where_it_stands() -> None:
    assert refusal(lambda: parse_json("{", "rows.jsonl, line 3")).startswith(
        "rows.jsonl, line 3 is not valid"
    )
