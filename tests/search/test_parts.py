"""Parts of a search in one folder belong together, or are refused by name."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.search.parts import SCHEMA, Part, parts_in, place_of

FIRST = Part(
    schema=SCHEMA,
    shard="1/2",
    key="a",
    model="smollm2",
    files={"model.safetensors": "abc"},
    options={"seed": 0, "calib": "prose"},
    cuts=("s0.1", "s0.3"),
    points=("points/1.json",),
)
SECOND = replace(FIRST, shard="2/2", cuts=("s0.2",), points=("points/2.json",))
NAMES = ("parts/1-of-2-run0.json", "parts/2-of-2-run1.json")


def folder_of(out: Path, *parts: Part) -> Path:
    (out / "parts").mkdir()
    for number, part in enumerate(parts):
        write_json(out / place_of(part.shard, f"run{number}"), asdict(part))
    return out


def test_parts_of_one_search_are_known_by_their_files(tmp_path: Path) -> None:
    assert parts_in(tmp_path) == {}
    assert parts_in(folder_of(tmp_path, FIRST, SECOND)) == dict(zip(NAMES, (FIRST, SECOND), strict=True))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (replace(SECOND, key="b", options={**FIRST.options, "seed": 1}), "seed, 0 and 1"),
        (replace(SECOND, key="b", model="qwen2", files={"model.safetensors": "def"}), "their weights"),
    ],
)
def test_parts_of_two_searches_are_named(tmp_path: Path, other: Part, difference: str) -> None:
    with pytest.raises(NirvanaError) as refused:
        parts_in(folder_of(tmp_path, FIRST, other))
    said = f"{NAMES[0]} of smollm2 and {NAMES[1]} of {other.model}: they differ in {difference}."
    assert said in refused.value.message and "into an empty folder" in str(refused.value.hint)


def test_parts_that_made_the_same_cut_are_named(tmp_path: Path) -> None:
    other = replace(SECOND, shard="1/1", cuts=("s0.2", "s0.3"))
    with pytest.raises(NirvanaError, match=r"overlap: parts/1-of-1-run1.json and \S+ both made s0\.3\."):
        parts_in(folder_of(tmp_path, FIRST, other))


def test_shards_of_one_folder_may_share_a_cut_and_a_search_made_anew_reads_them_mixed(tmp_path: Path) -> None:
    """One of them was resumed with more sparsities."""
    other = replace(SECOND, cuts=("s0.2", "s0.3"))
    folder_of(tmp_path, FIRST)
    write_json(tmp_path / place_of(other.shard, "run0"), asdict(other))
    assert len(parts_in(tmp_path)) == 2
    write_json(tmp_path / place_of("1/1", "run9"), asdict(other))
    with pytest.raises(NirvanaError, match="overlap"):
        parts_in(tmp_path)
    assert len(parts_in(tmp_path, mixed=True)) == 3
