"""Types of options: what a user may type for a size."""

from __future__ import annotations

import click
import pytest

from nirvana_deploy.cli.options import Bytes


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
