"""``quantize``: an option that the scheme does not read is no option of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from nirvana_deploy.cli.quantize import quantize


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scheme", "w4", "--keep-fp", "3"), "--keep-fp has no effect on w4"),
        (("--scheme", "w4", "--sensitivity"), "--sensitivity has no effect on w4"),
        (("--scheme", "int8", "--block-size", "64"), "--block-size has no effect on int8"),
        (("--scheme", "w8", "--block-size", "64"), "--block-size has no effect on w8"),
        (("--scheme", "w8", "--seq-len", "64"), "--seq-len is about windows of --calib, which is missing"),
    ],
)
def test_an_option_without_use_is_a_usage_error(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(quantize, [str(tmp_path), *words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and said in result.output, result.output
