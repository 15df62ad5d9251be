"""The processes of models that are timed together; one that fails takes no other with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.measure.worker import WorkerProcess


class Model(Protocol):
    """What a process is started for."""

    @property
    def name(self) -> str:
        """Its name among those that are timed."""
        ...

    @property
    def path(self) -> Path:
        """What is loaded."""
        ...

    @property
    def runtime(self) -> str | None:
        """None for the one that the path is for."""
        ...


@contextmanager
def started(
    models: Sequence[Model],
    *,
    threads: int | None,
    lost: MutableMapping[str, NirvanaError] | None,
    progress: Progress = SILENT,
) -> Iterator[dict[str, WorkerProcess]]:
    """A fresh process for each model, by name, so that its peak memory is that of what it is asked now.

    One that does not load goes into ``lost`` with its error; without ``lost`` that is raised.
    """
    with ExitStack() as stack:
        workers = {}
        for model in models:
            progress.note(f"Loading {model.name}")
            worker = WorkerProcess(model.name, model.path, threads=threads, runtime=model.runtime)
            try:
                workers[model.name] = stack.enter_context(worker)
            except NirvanaError as error:
                if lost is None:
                    raise
                lost[model.name] = error
        yield workers


def require_any(left: Collection[str], lost: Mapping[str, NirvanaError]) -> None:
    """Raise the first error where all models are lost, and nothing is left to write."""
    if not left:
        raise next(iter(lost.values()))


def failures(models: Sequence[Model], lost: Mapping[str, NirvanaError]) -> list[dict[str, Any]]:
    """An entry of ``failed`` for each model that could not be loaded, or died."""
    return [
        {
            "name": one.name,
            "path": str(one.path),
            "runtime": one.runtime,
            "reason": lost[one.name].message.removeprefix(f"{one.name}: "),
            "hint": lost[one.name].hint,
        }
        for one in models
        if one.name in lost
    ]
