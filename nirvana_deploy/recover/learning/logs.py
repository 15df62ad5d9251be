"""Where a training tells its course while it goes on: tensorboard's files, or wandb.

Both are callbacks of transformers' Trainer. What they write lies beside the saved states first, and goes with
the trained tensors in the end. wandb sends it to its server as well, unless its own WANDB_MODE says offline.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError

NOWHERE = "none"
LOGS = (NOWHERE, "tensorboard", "wandb")
_EXTRA = {"tensorboard": "recover", "wandb": "wandb"}
LOG_FOLDER = "log"
"""In the folder of saved states, and in that of the trained tensors."""
_PROJECT = "nirvana-deploy"


def require_log(log: str, *, method: str) -> None:
    """Raise MissingExtraError for the package that ``log`` needs, NirvanaError for a method without logs."""
    if log == NOWHERE:
        return
    if importlib.util.find_spec(log) is None:
        raise MissingExtraError(f"--recover-log {log}", package=log, extra=_EXTRA[log])
    if method == "layers":
        raise NirvanaError(
            f"--recover-log {log} follows transformers' Trainer, and --recover-method layers trains without "
            "it.",
            hint="Leave --recover-log out, or pass --recover-method distill.",
        )


@contextmanager
def told(log: str, folder: Path, *, begin_step: int) -> Iterator[Sequence[Any]]:
    """Callbacks that tell ``log`` the course from ``begin_step`` on; files go to ``folder``.

    Raises NirvanaError where wandb can begin no run.
    """
    if log == "tensorboard":
        with _tensorboard(folder, begin_step) as callback:
            yield [callback]
    elif log == "wandb":
        with _wandb(folder) as callback:
            yield [callback]
    else:
        yield []


@contextmanager
def _tensorboard(folder: Path, begin_step: int) -> Iterator[Any]:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    # what a killed run told behind its last saved state comes again
    writer = SummaryWriter(str(folder), purge_step=begin_step + 1 if begin_step else None)
    try:
        yield TensorBoardCallback(writer)
    finally:
        writer.close()


@contextmanager
def _wandb(folder: Path) -> Iterator[Any]:
    import wandb
    from transformers.integrations import WandbCallback

    folder.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(project=os.environ.get("WANDB_PROJECT", _PROJECT), dir=str(folder))
    except wandb.Error as error:
        raise NirvanaError(
            f"wandb could not begin a run: {error}",
            hint="Log in (wandb login), set WANDB_MODE=offline, or pass --recover-log tensorboard, then "
            "repeat the command; prune and prune-export take --resume with it.",
        ) from error
    try:
        yield WandbCallback()
    finally:
        run.finish()


def keep_log(state: Path, out: Path) -> None:
    """Copy what was told from the folder ``state`` to the folder ``out``, if anything was; links stay."""
    if (state / LOG_FOLDER).is_dir():
        shutil.copytree(state / LOG_FOLDER, out / LOG_FOLDER, ignore=_links)


def _links(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_symlink()]
