"""One run in several processes, as ``torchrun`` or ``accelerate launch`` start them.

The first process does everything; the others wait until it has work to share, take part in that, and wait
again. They read models where the first one did: several hosts must see the same files. What is summed over
windows is summed by the first process in the order of micro-batches, so the number of processes changes no
byte.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.prune.streaming.loading import compute_device

_PATIENCE = timedelta(days=2)
"""Of those that wait, while the first one does what is not shared."""
_TOLD_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_DTYPES = (torch.float32, torch.float64, torch.int64, torch.uint8, torch.float16, torch.bfloat16)
_MOST_DIMENSIONS = 6
_count = 1
"""Of the processes that found each other."""
_Item = TypeVar("_Item")


def count() -> int:
    """How many processes share the work."""
    return _count


def is_first() -> bool:
    """Whether this process is the one that does everything else, too."""
    return _count == 1 or os.environ["RANK"] == "0"


def launched() -> int:
    """How many a launcher started that tells each of them all it must know."""
    number = os.environ.get("WORLD_SIZE", "")
    return int(number) if number.isdigit() and all(one in os.environ for one in _TOLD_BY_LAUNCHERS) else 1


@contextmanager
def together() -> Iterator[None]:
    """Let the processes find each other; those that wait at the end of the block are let go.

    Raises NirvanaError in place of what torch says of a process that is gone; others end without a word
    where the first one is.
    """
    if launched() == 1:
        yield
        return
    global _count
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # a model in parts is saved and loaded by way of the CPU, which NCCL does not know
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=_PATIENCE)
    _count = launched()
    try:
        yield
        if is_first():
            tell(None)
    except RuntimeError as error:
        if not isinstance(error, distributed.DistBackendError) and "gloo" not in str(error):
            raise
        if is_first():  # which has said itself why it is gone; the launcher tells of one that was killed
            raise _lost(error) from None
    finally:
        distributed.destroy_process_group()
        _count = 1


def _lost(error: Exception) -> NirvanaError:
    # without the place in gloo's sources, and gloo's advice
    said = re.sub(r"^\[.*?\] ", "", str(error)).partition(". ")[0]
    return NirvanaError(
        f"A process of this run was lost: {said}.",
        hint="Finished stages are kept: repeat the command with --resume.",
    )


def tell(work: Mapping[str, Any] | None, *tensors: torch.Tensor) -> None:
    """Give all others ``work``, JSON, with tensors; None lets them go. Nothing in a process that is alone."""
    if count() > 1:
        written = torch.frombuffer(bytearray(json.dumps(work).encode()), dtype=torch.uint8)
        for one in (written, torch.tensor(len(tensors)), *tensors):
            _broadcast(one)


def follow(take_part: Mapping[str, Callable[..., object]]) -> None:
    """Do what the first process shares, by its key ``work``, until it lets go; for all others."""
    while True:
        work = json.loads(bytes(_broadcast(None).tolist()))
        tensors = [_broadcast(None) for _ in range(int(_broadcast(None)))]
        if work is None:
            return
        take_part[work.pop("work")](work, *tensors)


def wait_for_all() -> None:
    """Return when every process is here."""
    if count() > 1:
        distributed.barrier()


@dataclass(frozen=True)
class Share:
    """The micro-batches that this process reads: of P processes, the p-th reads every P-th from p on."""

    batches: int
    """Of all processes."""

    def turns(self, items: Sequence[_Item]) -> Iterator[tuple[int, _Item | None]]:
        """(number among all, item) of each of this process's micro-batches; None where it has none left."""
        rank = 0 if count() == 1 else distributed.get_rank()
        for index, start in enumerate(range(0, self.batches, count())):
            yield start + rank, items[index] if start + rank < self.batches else None

    def gathered(
        self, number: int, tensors: Sequence[torch.Tensor] | None
    ) -> Iterator[tuple[int, Sequence[torch.Tensor]]]:
        """What each process has of its micro-batch of this turn, with its number, in order.

        The first process gets it, its own ``tensors`` as they are; the others send theirs and get nothing.
        """
        if not is_first():
            if tensors is not None:
                _send(tensors, receiver=0)
            return
        assert tensors is not None
        yield number, tensors
        for sender in range(1, min(count(), self.batches - number)):
            yield number + sender, _receive(sender)

    def from_first(self, tensors: Sequence[torch.Tensor] | None) -> Sequence[torch.Tensor]:
        """The ``tensors`` of the first process, for all that have a micro-batch; others pass None."""
        if tensors is None:
            return [one.cpu() for one in _receive(0)]
        for receiver in range(1, min(count(), self.batches)):
            _send(tensors, receiver=receiver)
        return tensors


def share_of(windows: torch.Tensor, micro_batch: int) -> tuple[torch.Tensor, Share]:
    """The windows [n, T] of [N, T] that this process reads; none where there are more processes than work."""
    starts = range(0, len(windows), micro_batch)
    if count() == 1:
        return windows, Share(len(starts))
    own = [windows[start : start + micro_batch] for start in starts[distributed.get_rank() :: count()]]
    return torch.cat([windows[:0], *own]), Share(len(starts))


def _broadcast(tensor: torch.Tensor | None) -> torch.Tensor:
    """The first process's ``tensor``, on the CPU; others pass None."""
    device = compute_device()
    header = torch.zeros(2 + _MOST_DIMENSIONS, dtype=torch.int64) if tensor is None else _header(tensor)
    header = header.to(device)
    distributed.broadcast(header, src=0)
    made = _empty(header, device) if tensor is None else tensor.to(device).contiguous()
    distributed.broadcast(made, src=0)
    return made.cpu()


def _send(tensors: Sequence[torch.Tensor], *, receiver: int) -> None:
    device = compute_device()
    distributed.send(torch.tensor(len(tensors), device=device), dst=receiver)
    for tensor in tensors:
        distributed.send(_header(tensor).to(device), dst=receiver)
        distributed.send(tensor.to(device).contiguous(), dst=receiver)


def _receive(sender: int) -> list[torch.Tensor]:
    device = compute_device()
    number, tensors = torch.tensor(0, device=device), []
    distributed.recv(number, src=sender)
    for _ in range(int(number)):
        header = torch.zeros(2 + _MOST_DIMENSIONS, dtype=torch.int64, device=device)
        distributed.recv(header, src=sender)
        tensors.append(_empty(header, device))
        distributed.recv(tensors[-1], src=sender)
    return tensors


def _header(tensor: torch.Tensor) -> torch.Tensor:
    """(dtype, number of dimensions, each of them)."""
    padded = [*tensor.shape, *[0] * (_MOST_DIMENSIONS - tensor.ndim)]
    return torch.tensor([_DTYPES.index(tensor.dtype), tensor.ndim, *padded])


def _empty(header: torch.Tensor, device: torch.device) -> torch.Tensor:
    dtype, dimensions, *sizes = header.tolist()
    return torch.empty(sizes[:dimensions], dtype=_DTYPES[dtype], device=device)
