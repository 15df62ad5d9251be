"""Types of options: what a user may type for a size, a share, several names."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from nirvana_deploy.base.units import format_bytes, typed_bytes
from nirvana_deploy.cli.main import commands
from nirvana_deploy.cli.options import Bytes, Listed, Share

SIZES = {
    "300MB": 300_000_000,
    "300M": 300_000_000,
    "0.3 gb": 300_000_000,
    "1.1kB": 1100,
    "1.5MiB": 3 << 19,
    "2Gi": 2 << 30,
    "1024B": 1024,
}


@pytest.mark.parametrize("typed", SIZES)
def test_a_size_is_decimal_as_on_pages_unless_it_says_otherwise(typed: str) -> None:
    assert Bytes().convert(typed, None, None) == SIZES[typed]


def test_a_file_that_is_shown_as_larger_than_a_limit_does_not_meet_it() -> None:
    limit = Bytes().convert("300MB", None, None)
    assert format_bytes(limit) == "300 MB" and limit < 314_000_000


@pytest.mark.parametrize("typed", ["inf", "nan", "1e999G", "much", "", "-5MB", "iB"])
def test_what_is_no_size_is_refused(typed: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size: write 300MB, 2GB, or 512MiB"):
        Bytes().convert(typed, None, None)


@pytest.mark.parametrize("command", ["prune-export", "search"])
def test_a_size_without_a_unit_is_refused_with_what_may_have_been_meant(command: str) -> None:
    refused = CliRunner().invoke(commands, [command, "smollm2", "--max-weights-bytes", "300"])
    assert refused.exit_code == 2
    assert "300 has no unit: write 300MB, 300MiB, or 300B for bytes." in refused.output


def test_a_default_is_shown_as_it_is_typed() -> None:
    shown = CliRunner().invoke(commands, ["serve", "--help"]).output
    assert "[default: 1MiB" in shown
    for size in (1, 1234, 300_000_000, 1 << 20, 3 << 29):
        assert Bytes().convert(typed_bytes(size), None, None) == size


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


@pytest.mark.parametrize(
    ("words", "option"), [("quantize", "--scheme"), ("generate", "--prompt"), ("select-calib", "--sparsity")]
)
def test_what_has_no_default_is_asked_for_by_name(words: str, option: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(commands, [words, str(tmp_path)])
    assert found.exit_code == 2 and f"Missing option '{option}'" in found.output
