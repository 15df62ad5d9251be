"""Random token ids, and closeness of float32 results."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def random_tokens(*shape: int, seed: int = 5) -> NDArray[np.int64]:
    """Token ids of ``shape``, none of them special."""
    return np.random.default_rng(seed).integers(3, 250, size=shape)


def equal(found: Any, expected: Any) -> None:
    """Assert that two runtimes computed the same in float32."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
