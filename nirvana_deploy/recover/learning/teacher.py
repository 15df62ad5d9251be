"""The dense model as a teacher: beside the student, or its states on disk, computed block by block before.

What is kept is what enters the head, D numbers a position in float16 with a float32 scale of each position's
own: the head itself is the student's, which is not trained. So the whole distribution comes back, in 2 D + 4
bytes. The k largest log-probabilities hide less than a hundredth of the KL only beyond twenty times as many
bytes (benchmarks/NOTES.md).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from nirvana_deploy.base.artifact import whole_folder, write_json
from nirvana_deploy.base.progress import Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.resources import disk_errors, require_free_bytes
from nirvana_deploy.base.units import format_bytes
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.streaming.loading import compute_device
from nirvana_deploy.prune.streaming.model import StreamedModel, micro_batches
from nirvana_deploy.recover.learning.losses import Logits
from nirvana_deploy.recover.learning.needs import stored_bytes
from nirvana_deploy.recover.learning.sharding import is_sharded, share_layers
from nirvana_deploy.recover.learning.states import StatesOf

_AT_ONCE_BYTES = 1 << 30
"""Of float32 states between two blocks, while the dense model is run."""
_MICRO_BATCH = 8
_MADE_OF = "windows.json"


class Teacher(Protocol):
    """What a distribution is learnt from."""

    def wanted(self, windows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Its states [P, D] at the positions of windows [N, T], whose ``numbers`` [N] count all windows."""

    def logits(self) -> Logits:
        """Turns these states into logits."""


class LiveTeacher:
    """The dense model in memory, its layers in parts where the student's are."""

    def __init__(self, dense: Checkpoint, *, bfloat16: bool = False) -> None:
        model = dense.load().requires_grad_(False)
        if is_sharded():
            share_layers(model, bfloat16=bfloat16)
        else:
            model.to(compute_device())
        self._states = StatesOf(dense, model)

    @torch.no_grad()
    def wanted(self, windows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Computed anew."""
        return self._states.states(windows).flatten(0, 1)

    def logits(self) -> Logits:
        """Of the dense model's head."""
        return self._states.logits()


class StoredTeacher:
    """Its states in a folder that :func:`store_states` wrote; read where they are wanted."""

    def __init__(self, folder: Path, student: StatesOf) -> None:
        self._states = np.load(folder / "states.npy", mmap_mode="r")
        self._sizes = np.load(folder / "sizes.npy", mmap_mode="r")
        self._student = student

    def wanted(self, windows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Read from the disk."""
        rows = numbers.cpu().numpy()
        states = torch.from_numpy(self._states[rows].astype(np.float32) * self._sizes[rows])
        return states.flatten(0, 1).to(windows.device)

    def logits(self) -> Logits:
        """Of the student's head, which is the dense model's."""
        return self._student.logits()


def store_states(dense: Checkpoint, windows: NDArray[np.int64], folder: Path, *, progress: Progress) -> None:
    """Write the states of windows [N, T] to ``folder``, unless a killed run wrote those of the same there.

    One block of the dense model is in memory at a time. The folder appears whole or not at all. Raises
    NirvanaError for too little disk.
    """
    made_of = {"windows_sha256": hashlib.sha256(windows.tobytes()).hexdigest()}
    if (folder / _MADE_OF).is_file() and read_json(folder / _MADE_OF) == made_of:
        return
    needed_bytes = stored_bytes(dense.shape, *windows.shape)
    require_free_bytes(folder.parent, needed_bytes, what="Keeping the dense model's states")
    progress.note(f"The dense model's states take {format_bytes(needed_bytes)} on disk during the training.")
    model = StreamedModel(dense)
    positions, width = model.read(torch.from_numpy(windows[:1]))[-1].shape[1], dense.shape.hidden_size
    at_once = max(_MICRO_BATCH, _AT_ONCE_BYTES // (4 * positions * width))
    parts = [windows[start : start + at_once] for start in range(0, len(windows), at_once)]
    label = f"Running the dense model on {windows.size:,} tokens"
    with (
        whole_folder(folder) as made,
        disk_errors(folder.parent),
        progress.task(label, len(parts) * len(dense.shape.layers)) as advance,
    ):
        states = _array(made / "states.npy", np.float16, (len(windows), positions, width))
        sizes = _array(made / "sizes.npy", np.float32, (len(windows), positions, 1))
        done = 0
        for part in parts:
            batches = micro_batches(torch.from_numpy(part), _MICRO_BATCH)
            for entering in model.states_for_head(batches, advance=advance):
                rows = slice(done, done + len(entering))
                found = entering.cpu().numpy()
                sizes[rows] = np.maximum(np.abs(found).max(-1, keepdims=True), np.finfo(np.float32).tiny)
                states[rows] = found / sizes[rows]
                done = rows.stop
        states.flush()
        sizes.flush()
        write_json(made / _MADE_OF, made_of)


def _array(file: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)


class StandIn:
    """States of no model, for timing a step whose teacher is on disk."""

    def __init__(self, student: StatesOf, width: int) -> None:
        self._student, self._width = student, width

    def wanted(self, windows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        positions = self._student.read(windows)[-1].numel()
        return torch.zeros(positions, self._width, device=windows.device)

    def logits(self) -> Logits:
        """Of the student's head."""
        return self._student.logits()
