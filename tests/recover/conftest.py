"""What tests of recovery share."""

from __future__ import annotations

from pathlib import Path

import pytest

from nirvana_deploy.recover import loop


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_MEASUREMENTS", 4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    lines = (f"Day {n}: {n * 7919 % 1000} apples and {n * 104729 % 997} pears.\n" for n in range(400))
    file.write_text("".join(lines))
    return file
