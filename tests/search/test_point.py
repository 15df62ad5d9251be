"""A result lies under the hash of what its point is."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.search.point import Point, Way, file_of, key_of, nothing_found, read_found, said

KEY = key_of({"files": {"model.safetensors": "ab"}, "options": {"seed": 0}})
FOUND = replace(nothing_found(KEY, Point(0.2, "w4"), "s0.2"), kl=0.25, weights_bytes=95_000_000)


def test_a_result_is_found_by_what_was_asked() -> None:
    places = {file_of(KEY, Point(s, scheme)) for s in (0.0, 0.2) for scheme in (None, "w4")}
    assert len(places) == 4
    assert file_of(KEY, FOUND.point) == file_of(KEY, Point(0.2, "w4"))
    assert key_of({"options": {"seed": 1}}) != KEY
    ways = [
        Way("ridge1", (("ridge", 1.0),)),
        Way("ridge1", (("ridge", 1),)),
        Way("ridge2", (("ridge", 2.0),)),
    ]
    tried = [Point(0.2, "w4", way) for way in ways]
    assert len({file_of(KEY, point) for point in (FOUND.point, *tried)}) == 4
    assert [point.name for point in tried] == ["s0.2-ridge1-w4", "s0.2-ridge1-w4", "s0.2-ridge2-w4"]
    assert nothing_found(KEY, tried[0], "f").point == tried[0]


def test_it_is_read_as_it_was_written_and_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    write_json(path, asdict(FOUND))
    assert read_found(path, key=KEY, point=FOUND.point) == FOUND
    assert FOUND.variant.name == "pruned-w4" and replace(FOUND, sparsity=0.0).variant.name == "dense-w4"
    with pytest.raises(NirvanaError, match="of another search"):
        read_found(path, key="other", point=FOUND.point)
    with pytest.raises(NirvanaError, match=r"no result of s0\.3-w4: it says 's0\.2-w4'"):
        read_found(path, key=KEY, point=Point(0.3, "w4"))
    write_json(path, asdict(replace(FOUND, folder="../s0.2")))
    with pytest.raises(NirvanaError, match="no result of"):
        read_found(path, key=KEY, point=FOUND.point)
    write_json(path, asdict(replace(FOUND, kl="much")))  # type: ignore[arg-type]
    with pytest.raises(NirvanaError, match="kl"):
        read_found(path, key=KEY, point=FOUND.point)


def test_what_is_said_of_a_point() -> None:
    assert said(FOUND) == "s0.2-w4 (KL 0.25, 95.0 MB)"
    assert said(replace(FOUND, tpot_ms=12.34, speedup=2.1, weights_bytes=None)) == (
        "s0.2-w4 (KL 0.25, 12.3 ms a token, 2.1 times as fast as dense)"
    )
