"""Whether this machine has an NVIDIA GPU that works."""

from __future__ import annotations

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice


def why_no_gpu() -> str | None:
    """The driver's own answer: a torch without CUDA says nothing about the machine."""
    try:
        CudaDevice().close()
    except NirvanaError as error:
        return error.message
    return None


without_gpu = pytest.mark.skipif(
    why_no_gpu() is None, reason="says what happens without a GPU; this machine has one"
)
