"""One function for many pieces of work: one after another, in processes of their own, or on a cluster."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import threads_shared_by
from nirvana_deploy.search.cluster import run_on_cluster
from nirvana_deploy.search.recipe import Where

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def run_points(
    pieces: Sequence[Piece],
    work: Callable[[Piece], Result],
    where: Where,
) -> Iterator[tuple[Piece, Result | NirvanaError]]:
    """Do ``work`` on each of ``pieces``; yields each with its result as it comes, or with why it has none.

    A failure of one is no failure of the others. In more than one process, ``work`` and the pieces are
    pickled, and each process does one piece after another, with its part of the threads; a cluster is one
    of Ray.
    """
    if where.cluster is not None:
        yield from run_on_cluster(pieces, work, where.cluster)
        return
    if where.processes == 1 or len(pieces) < 2:
        for piece in pieces:
            try:
                yield piece, work(piece)
            except NirvanaError as failure:
                yield piece, failure
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    processes = min(where.processes, len(pieces))
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        with threads_shared_by(processes):  # a process is started when something is submitted
            running = {pool.submit(work, piece): piece for piece in pieces}
        try:
            for done in as_completed(running):
                error = done.exception()
                if error is not None and not isinstance(error, NirvanaError):
                    raise error
                yield running[done], error if isinstance(error, NirvanaError) else done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
