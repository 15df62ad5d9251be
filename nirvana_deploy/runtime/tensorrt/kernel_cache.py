"""Kernels that TensorRT-RTX compiled for one engine on one GPU, kept from process to process.

An RTX engine is finished on the machine that runs it: each new shape costs a compilation the first time.
With this file the first time is the first ever. TensorRT-RTX itself refuses what another version, GPU or
driver wrote, and starts anew then.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.errors import NirvanaError


class KernelCache:
    """The cache of all contexts of one engine, read from ``path`` when the first one is made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None
        self._read = b""

    def attach(self, config: Any) -> None:
        """Give the cache to an IRuntimeConfig, from which a context is then made."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._path.is_file():
                self._read = self._path.read_bytes()
                self._cache.deserialize(self._read)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what was compiled since, if anything; a cache that cannot be written is done without."""
        if self._cache is None:
            return
        found = bytes(self._cache.serialize())
        if found != self._read:
            with suppress(OSError, NirvanaError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(self._path, found)
        self._cache = None
