"""What is not zero is not written as zero."""

from __future__ import annotations

import pytest

from nirvana_deploy.base.units import format_bytes, format_count, format_ms, format_seconds


@pytest.mark.parametrize("exponent", range(-9, 18))
@pytest.mark.parametrize("digits", [1, 4.44, 5, 9.949, 9.996])
def test_no_size_and_no_duration_is_zero(digits: float, exponent: int) -> None:
    value = digits * 10.0**exponent
    for written in (format_bytes(value), format_count(value), format_ms(value), format_seconds(value)):
        number = written.removeprefix("< ").split(" ")[0]
        assert float(number.replace(",", "")) > 0, written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.004, "< 0.01 s"),
        (0.04, "0.04 s"),
        (5999, "99 min 59 s"),
        (6000, "1 h 40 min"),
        (7170, "2 h 00 min"),
    ],
)
def test_a_duration_has_the_units_that_suit_it(seconds: float, written: str) -> None:
    assert format_seconds(seconds) == written
