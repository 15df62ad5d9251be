"""What tests of recovery share."""

from __future__ import annotations

import pytest

from nirvana_deploy.recover import data, loop


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """On few tokens: no text of another kind is read for it."""
    monkeypatch.setattr(loop, "_MEASUREMENTS", 4)
    monkeypatch.setattr(data, "OTHER_KINDS", ())
