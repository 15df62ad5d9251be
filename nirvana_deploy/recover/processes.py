"""One training in several processes, as ``accelerate launch`` or ``torchrun`` start them.

The first process does everything; the others wait until it has something to train, take part in that, and
end. They read the models and windows where the first one put them: on several hosts, the output folder must
be on a disk that all of them see.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.prune.streaming.loading import compute_device

_PATIENCE = timedelta(days=2)
"""Of those that wait, while the first one measures and writes text."""
_TOLD_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_count = 1
"""Of the processes that found each other."""
_told = False
"""Whether the others have been told what to do."""


def count() -> int:
    """How many processes share a training."""
    return _count


def is_first() -> bool:
    """Whether this process is the one that does everything else, too."""
    return _count == 1 or os.environ["RANK"] == "0"


def _launched() -> int:
    """How many a launcher started that tells each of them all it must know."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _TOLD_BY_LAUNCHERS) else 1


@contextmanager
def together() -> Iterator[None]:
    """Let the processes find each other; those that still wait at the end of the block are let go.

    Raises NirvanaError for a launcher that would share one model among the processes.
    """
    if _launched() == 1:
        yield
        return
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise NirvanaError(
            "Recovery shares the windows of a step among processes, not the model, and FSDP is asked for.",
            hint="Launch it without FSDP. To take less memory: --recover-teacher stored, "
            "--recover-method lora, --recover-micro-batch 1.",
        )
    if find_spec("accelerate") is None:
        raise MissingExtraError("Recovery", package="accelerate", extra="recover")
    from accelerate import PartialState

    global _count
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    _count = _launched()
    try:
        yield
    finally:
        if is_first() and not _told:
            tell(None)
        state.destroy_process_group()
        _count = 1


def tell(work: dict[str, Any] | None) -> None:
    """Give all others ``work``, JSON, or nothing to do; does nothing in a process that is alone."""
    global _told
    if count() > 1:
        _told = True
        written = torch.frombuffer(bytearray(json.dumps(work).encode()), dtype=torch.uint8).to(
            compute_device()
        )
        torch.distributed.broadcast(torch.tensor(len(written), device=compute_device()), src=0)
        torch.distributed.broadcast(written, src=0)


def follow(take_part: Callable[[dict[str, Any]], object]) -> None:
    """Wait for work and do it; for all processes but the first."""
    length = torch.tensor(0, device=compute_device())
    torch.distributed.broadcast(length, src=0)
    written = torch.empty(int(length), dtype=torch.uint8, device=compute_device())
    torch.distributed.broadcast(written, src=0)
    if (work := json.loads(bytes(written.tolist()))) is not None:
        take_part(work)


def wait_for_all() -> None:
    """Return when every process is here."""
    if count() > 1:
        torch.distributed.barrier()


def require_fit(*, method: str, step_windows: int, trainings: int = 1) -> None:
    """Raise NirvanaError for processes that a recovery cannot use."""
    if _launched() > count():
        raise NirvanaError(
            f"{_launched()} processes were launched, and this command runs in one.",
            hint="Start it without the launcher, and launch the training afterwards: "
            "torchrun --nproc-per-node 2 -m nirvana_deploy recover OUT --tokens 2000000",
        )
    if method == "layers" and count() > 1:
        raise NirvanaError(
            f"--recover-method {method} runs in one process, and {count()} were launched.",
            hint="Start nirvana-deploy without the launcher.",
        )
    if trainings > 1 and count() > 1:
        raise NirvanaError(
            f"--steps {trainings} trains several times, and launched processes take part in one training.",
            hint="Start nirvana-deploy without the launcher, or leave --steps out.",
        )
    share_of(step_windows)


def share_of(step_windows: int) -> int:
    """Windows of a step that each process reads; raises NirvanaError where they do not come out even."""
    if step_windows % count():
        raise NirvanaError(
            f"A step of {step_windows} windows cannot be shared evenly by {count()} processes.",
            hint=f"Pass --recover-batch {-(-step_windows // count()) * count()}.",
        )
    return step_windows // count()
