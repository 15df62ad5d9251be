"""Types of options: what a user may type for a size, a share, several names."""

from __future__ import annotations

import click
import pytest

from nirvana_deploy.cli.options import Bytes, Listed, Share


def test_a_size_has_a_unit_or_none() -> None:
    assert [Bytes().convert(typed, None, None) for typed in ("2G", "1.5MiB", "1024")] == [
        2 << 30,
        3 << 19,
        1024,
    ]


@pytest.mark.parametrize("typed", ["inf", "nan", "1e999G", "much", ""])
def test_what_is_no_size_is_refused(typed: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is no size; 2G, 512M"):
        Bytes().convert(typed, None, None)


def test_a_share_may_be_a_percentage() -> None:
    assert [Share().convert(typed, None, None) for typed in ("0.4", "40%", " 2.5% ")] == [0.4, 0.4, 0.025]


@pytest.mark.parametrize("typed", ["40%%", "nan", "inf%", "much", "%", ""])
def test_what_is_no_share_is_refused(typed: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is no share; 0\.4 and 40% are"):
        Share().convert(typed, None, None)


def test_names_are_separated_by_commas_or_repeated() -> None:
    names = Listed(click.Choice(["int8", "w8", "w4"]))
    assert names.convert("int8, w4", None, None) == ("int8", "w4")
    with pytest.raises(click.BadParameter, match="'w9' is not one of"):
        names.convert("int8,w9", None, None)
