"""What the dense model has behind the readers of a block, which is what a refit aims at.

Saliencies of features and the refit run it over the same windows. Where its states fit into memory, it runs
once for both, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psutil
import torch

from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.prune.refit.readers import Reader, Wanted, changed, watched
from nirvana_deploy.prune.streaming.processes import count

_FLOAT32_BYTES = 4
_MOST_BYTES = 2_000_000_000
_MOST_SHARE = 4
"""One part in so many of the memory that is free."""
States = list[torch.Tensor]
"""[n, T, D] per micro-batch."""
Aims = tuple[list[list[Wanted]], States]
"""(what is wanted behind each reader of a block, by micro-batch; the dense states that leave the block)."""


@contextmanager
def aims_noted(readers: Sequence[Reader]) -> Iterator[Callable[[States], Aims]]:
    """While the block runs in the dense model, note what is wanted behind its ``readers``.

    What it yields is called behind the runs, with the states that left the block.
    """
    behind: list[States] = [[] for _ in readers[1:]]
    outputs: list[States] = [[] for _ in readers]

    def keep(states: States, found: torch.Tensor) -> None:
        states.append(found.cpu())

    def aims(left: States) -> Aims:
        wanted = []
        for states, given in zip([*behind, left], outputs, strict=True):
            pairs = zip(states, given, strict=True) if given else ((one, None) for one in states)
            wanted.append([Wanted(*pair) for pair in pairs])
        return wanted, left

    with ExitStack() as hooks:
        for reader, states in zip(readers[1:], behind, strict=True):
            hooks.enter_context(watched(reader.entry, partial(keep, states)))
        for reader, given in zip(readers, outputs, strict=True):
            if reader.post_norm is not None:
                hooks.enter_context(changed(reader.linear, partial(keep, given)))
        yield aims


def kept_bytes(shape: ModelShape, tokens: int) -> int:
    """What the aims of all blocks on ``tokens`` take in memory; 0 where they do not fit, and none is kept.

    Nor those of an encoder-decoder, whose first block leaves the position biases of the others.
    """
    sites = [shape.place(position)[0] for position in range(len(shape.layers))]
    tensors = sum(2 + 2 * (site.attention_post_norm is not None) for site in sites)
    needed_bytes = tensors * tokens * shape.hidden_size * _FLOAT32_BYTES
    room_bytes = min(_MOST_BYTES, psutil.virtual_memory().available // _MOST_SHARE)
    return 0 if shape.family.encoder_decoder or needed_bytes > room_bytes else needed_bytes


class DenseStates:
    """The aims of all blocks on some windows, from one pass of the dense model for a later one."""

    def __init__(self) -> None:
        self._of: tuple[Path, torch.Tensor, int] | None = None
        self._kept: dict[tuple[int, ...], Aims] = {}

    def begin(self, checkpoint: Checkpoint, windows: torch.Tensor, micro_batch: int) -> bool:
        """Forget what there is; whether the aims of another pass fit into memory, and are to be kept."""
        self._of, self._kept = None, {}
        if count() > 1 or not kept_bytes(checkpoint.shape, windows.numel()):
            return False  # of several processes each has some of the windows
        self._of = checkpoint.path, windows, micro_batch
        return True

    def keep(self, positions: Sequence[int], aims: Aims) -> None:
        """Keep the aims of the block that holds these layers."""
        self._kept[tuple(positions)] = aims

    def of(self, checkpoint: Checkpoint, windows: torch.Tensor, micro_batch: int) -> bool:
        """Whether a pass over ``windows`` in such micro-batches would find what is kept."""
        if self._of is None or not self._kept:
            return False
        path, seen, batch = self._of
        return (path, batch) == (checkpoint.path, micro_batch) and torch.equal(seen, windows)

    def taken(self, positions: Sequence[int]) -> Aims:
        """The aims of a block, which are let go."""
        return self._kept.pop(tuple(positions))
