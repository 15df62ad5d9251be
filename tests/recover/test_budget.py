"""How long to train, as people write it."""

from __future__ import annotations

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.recover.budget import Budget, budget_of


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("30m", Budget(seconds=1800)),
        ("30min", Budget(seconds=1800)),
        ("1.5h", Budget(seconds=5400)),
        ("90s", Budget(seconds=90)),
        ("200k", Budget(tokens=200_000)),
        ("1.5M", Budget(tokens=1_500_000)),
        ("65536", Budget(tokens=65_536)),
    ],
)
def test_times_and_tokens(written: str, meant: Budget) -> None:
    assert budget_of(written) == meant


@pytest.mark.parametrize("written", ["", "m", "30 minutes", "-5m", "0", "1e6", "30M5", "nan"])
def test_anything_else_is_refused(written: str) -> None:
    with pytest.raises(NirvanaError, match=r"neither a time nor a number of tokens.\n.*--recover 30m"):
        budget_of(written)


def test_steps() -> None:
    assert Budget(tokens=10_000).steps(1024, step_seconds=8.0) == 9
    assert Budget(seconds=60).steps(1024, step_seconds=8.0) == 7
    with pytest.raises(NirvanaError, match=r"end within the first step, which takes 8\.00 s here"):
        Budget(seconds=5).steps(1024, step_seconds=8.0)
    with pytest.raises(NirvanaError, match="less than one step, which reads 1,024"):
        Budget(tokens=1000).steps(1024, step_seconds=8.0)
