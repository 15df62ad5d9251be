"""What tests of recovery share."""

from __future__ import annotations

import pytest

from nirvana_deploy.recover import loop


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_MEASUREMENTS", 4)
