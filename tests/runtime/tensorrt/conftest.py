"""A GPU for each test."""

from __future__ import annotations

import pytest
from builders.fake_cuda import FakeDriver


@pytest.fixture
def driver() -> FakeDriver:
    """A fake CUDA driver with one device, nothing on it."""
    return FakeDriver()
