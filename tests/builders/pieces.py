"""Pieces of work for many processes, in a module that each of them imports in a moment."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError


def halved(number: int) -> int:
    """Work that refuses odd numbers, and does not know 13."""
    if number == 13:
        raise ZeroDivisionError
    if number % 2:
        raise NirvanaError(f"{number} is odd.", hint="Try an even one.")
    return number // 2


def dying(piece: tuple[Path, int]) -> int:
    """Work that notes each try; its process is killed at the first one of 2, and at each of 3."""
    folder, number = piece
    tries = folder / str(number)
    with tries.open("a") as file:
        file.write(".")
    if number == 3 or (number == 2 and tries.stat().st_size == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def surroundings(_: int) -> tuple[int, int]:
    """Threads of torch, and GPUs that are to be seen."""
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return torch.get_num_threads(), len(seen.split(",")) if seen else 0
