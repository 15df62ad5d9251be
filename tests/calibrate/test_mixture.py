from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.mixture import Part, interleaved, parts_of, sources_of, split_by_share


def shares(calib: str, *, writes_text: bool = True) -> dict[str, float]:
    return {part.source: part.share for part in parts_of(calib, writes_text=writes_text)}


def refusal(calib: str) -> NirvanaError:
    with pytest.raises(NirvanaError) as caught:
        parts_of(calib, writes_text=True)
    return caught.value


def test_one_share_makes_the_list_a_mixture_and_none_leaves_candidates() -> None:
    assert sources_of("pydoc, notes.txt") == ("pydoc", "notes.txt")
    assert sources_of("pydoc,code:0.3") == ("pydoc,code:0.3",)
    assert sources_of("mix,pydoc") == ("mix", "pydoc")
    assert parts_of("pydoc", writes_text=True) == (Part("pydoc", 1.0),)


def test_parts_without_a_share_split_what_is_left() -> None:
    assert shares("a.txt,b.txt:0.3") == pytest.approx({"a.txt": 0.7, "b.txt": 0.3})
    assert shares("a,b,c:0.4") == pytest.approx({"a": 0.3, "b": 0.3, "c": 0.4})
    assert shares("a:0.333333,b:0.333333,c:0.333334") == pytest.approx(
        {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 1e-5
    )


@pytest.mark.parametrize("writes_text", [True, False])
def test_the_named_mixture_is_of_what_the_model_can_give(writes_text: bool) -> None:
    found = shares("mix", writes_text=writes_text)
    assert sum(found.values()) == pytest.approx(1) and {"prose", "pydoc", "code"} <= set(found)
    assert ("self" in found) == writes_text


def test_a_file_may_have_commas_and_colons_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b:0.3", "notes:0.5"):
        Path(name).write_text("text")
        assert sources_of(name) == (name,)
        assert shares(name) == {name: 1.0}
    assert shares("notes:0.5,pydoc:0.5") == {"notes:0.5": 0.5, "pydoc": 0.5}
    assert shares("notes:0.5:0.25,pydoc") == {"notes:0.5": 0.25, "pydoc": 0.75}
    assert shares(r"C:\texts\a.txt") == {r"C:\texts\a.txt": 1.0}
    assert shares(r"C:\texts\a.txt:0.25,pydoc") == {r"C:\texts\a.txt": 0.25, "pydoc": 0.75}


@pytest.mark.parametrize(
    ("calib", "complaint"),
    [
        ("pydoc:0.5,code:0.6", r"pydoc 0\.5, code 0\.6 add up to 1\.1, not to 1"),
        ("pydoc:0.5", r"pydoc 0\.5 add up to 0\.5, not to 1"),
        ("pydoc:0.3,code:0.3,self:0.3", r"add up to 0\.9, not to 1"),
        ("pydoc,code:1", "add up to 1, which leaves nothing for pydoc"),
        ("pydoc:0,code", r"share of pydoc must be above 0 and at most 1, got 0\."),
        ("pydoc:-0.5,code", r"got -0\.5\."),
        ("pydoc:nan,code", r"got nan\."),
        ("pydoc:inf,code", r"got inf\."),
        ("pydoc:70,code:30", r"share of pydoc .* got 70\."),
    ],
)
def test_bad_shares_are_shown_with_a_mixture_that_works(calib: str, complaint: str) -> None:
    error = refusal(calib)
    assert f"--calib {calib}" in error.message
    with pytest.raises(NirvanaError, match=complaint):
        raise error
    offered = (error.hint or "").split("--calib ")[1]
    assert sum(shares(offered).values()) == pytest.approx(1)
    assert list(shares(offered)) == [part.partition(":")[0] for part in calib.split(",")]


def test_a_part_named_twice_or_a_mixture_as_a_part_is_refused() -> None:
    assert "names pydoc twice" in refusal("pydoc:0.5,pydoc:0.5").message
    error = refusal("mix:0.5,pydoc:0.5")
    assert "cannot be a part" in error.message and "prose:" in (error.hint or "")


@pytest.mark.parametrize("total", [3, 4, 7, 16, 33, 128])
@pytest.mark.parametrize("wanted", [(0.5, 0.25, 0.25), (1 / 3, 1 / 3, 1 / 3), (0.98, 0.01, 0.01), (1.0,)])
def test_windows_are_divided_by_share_and_every_part_has_one(total: int, wanted: tuple[float, ...]) -> None:
    counts = split_by_share(total, wanted)
    assert sum(counts) == total and min(counts) >= 1
    if total * min(wanted) >= 1:
        assert all(abs(count - total * share) < 1 for count, share in zip(counts, wanted, strict=True))


def test_fewer_windows_than_parts_go_to_the_largest() -> None:
    assert split_by_share(2, (0.5, 0.3, 0.2)) == [1, 1, 0]
    assert split_by_share(0, (0.5, 0.5)) == [0, 0]


@pytest.mark.parametrize("counts", [(8, 4, 4), (64, 32, 32), (5, 3, 1), (1, 0, 2), (13,), (0, 0)])
def test_every_prefix_of_the_windows_has_about_the_shares(counts: tuple[int, ...]) -> None:
    order = interleaved(counts)
    assert sorted(order) == [(part, i) for part, count in enumerate(counts) for i in range(count)]
    for taken, part in itertools.product(range(len(order) + 1), range(len(counts))):
        expected = taken * counts[part] / max(sum(counts), 1)
        assert abs(sum(p == part for p, _ in order[:taken]) - expected) <= 1
        indices = [i for p, i in order[:taken] if p == part]
        assert indices == list(range(len(indices)))


@pytest.mark.parametrize("calib", [",", " , ,", ""])
def test_a_list_of_nothing_is_refused(calib: str) -> None:
    with pytest.raises(NirvanaError, match=r"names no text\.\n.*--calib pydoc"):
        sources_of(calib)
