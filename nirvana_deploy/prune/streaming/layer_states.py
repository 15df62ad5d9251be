"""Hidden states between layers, in memory or, beyond a budget, in a temporary file.

The backward pass needs the input of every layer: (L+1) N T D floats, 9 GB for the default calibration of a
Llama-3-8B. Each is written and read once, one micro-batch at a time, so a file serves as well as memory. The
file is not memory-mapped (mapped pages count as the process's memory) and nameless where the system allows:
it disappears with the process, however that ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import IO, Self

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.resources import disk_errors, require_free_bytes
from nirvana_deploy.base.units import format_bytes

_ELEMENT_BYTES = 4


class LayerStates:
    """float32 tensors by level (0 enters the first layer) and micro-batch; a context manager.

    ``shapes`` are those of the micro-batches, [n, T, D] each and the same at all ``levels``. ``spill`` sends
    them to a file in ``folder`` [the system's temporary folder]; None spills more than
    ``largest_in_memory_bytes`` or a quarter of the available memory. Raises NirvanaError, before any work,
    when the disk has too little space.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        *,
        levels: int,
        spill: bool | None = None,
        folder: Path | None = None,
        progress: Progress = SILENT,
        largest_in_memory_bytes: int = 2_000_000_000,
    ) -> None:
        self._shapes = list(shapes)
        *starts, self._level_bytes = accumulate((_ELEMENT_BYTES * prod(s) for s in shapes), initial=0)
        self._starts = starts
        self.total_bytes = levels * self._level_bytes
        budget_bytes = min(largest_in_memory_bytes, psutil.virtual_memory().available // 4)
        self.spilled = self.total_bytes > budget_bytes if spill is None else spill
        self._folder = folder or Path(tempfile.gettempdir())
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        self._file: IO[bytes] | None = None
        self._open = ExitStack()
        if self.spilled:
            require_free_bytes(self._folder, self.total_bytes, what="Spilling hidden states")
            progress.note(f"Hidden states take {format_bytes(self.total_bytes)} and go to {self._folder}.")

    def __enter__(self) -> Self:
        if self.spilled:
            with disk_errors(self._folder):
                file = tempfile.TemporaryFile(dir=self._folder, prefix=".partial-layer-states-")
            self._file = self._open.enter_context(file)
        return self

    def __exit__(self, *exception: object) -> None:
        self._kept.clear()
        self._file = None
        with disk_errors(self._folder):
            self._open.close()

    def __setitem__(self, place: tuple[int, int], states: torch.Tensor) -> None:
        level, batch = place
        assert states.dtype == torch.float32 and tuple(states.shape) == tuple(self._shapes[batch])
        if self._file is None:
            self._kept[place] = states.detach()
            return
        with disk_errors(self._folder):
            self._file.seek(level * self._level_bytes + self._starts[batch])
            self._file.write(_bytes_of(states.detach().contiguous()))

    def __getitem__(self, place: tuple[int, int]) -> torch.Tensor:
        if self._file is None:
            return self._kept[place]
        level, batch = place
        states = torch.empty(self._shapes[batch])
        with disk_errors(self._folder):
            self._file.seek(level * self._level_bytes + self._starts[batch])
            self._file.readinto(_bytes_of(states))  # type: ignore[attr-defined]
        return states

    def forget(self, level: int) -> None:
        """Free the memory of a level; a file keeps its size."""
        for batch in range(len(self._shapes)):
            self._kept.pop((level, batch), None)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, not a copy."""
    array: NDArray[np.float32] = tensor.numpy()
    return array.data.cast("B")
