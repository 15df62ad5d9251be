"""One function for many pieces of work: one after another, in processes of their own, or on a cluster."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import TypeVar

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import threads_for_others, usable_threads
from nirvana_deploy.search.cluster import RETRIES, lost, run_on_cluster
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
    of Ray. A piece whose process is lost is done again, up to three times.
    """
    if where.cluster is not None:
        yield from run_on_cluster(
            pieces, work, where.cluster, cpus=where.cpus_per_cut or 1, gpus=where.gpus_per_cut
        )
    elif where.processes == 1 or len(pieces) < 2:
        for piece in pieces:
            try:
                yield piece, work(piece)
            except NirvanaError as failure:
                yield piece, failure
    else:
        processes = min(where.processes, len(pieces))
        threads = where.cpus_per_cut or max(1, usable_threads() // processes)
        yield from _in_processes(pieces, work, processes, threads)


def _in_processes(
    pieces: Sequence[Piece], work: Callable[[Piece], Result], processes: int, threads: int
) -> Iterator[tuple[Piece, Result | NirvanaError]]:
    """One pool for each process, so that one that is lost takes no piece but its own with it."""
    waiting = deque((piece, 0) for piece in pieces)
    idle = [_pool() for _ in range(processes)]
    running: dict[Future[Result], tuple[ProcessPoolExecutor, Piece, int]] = {}
    try:
        while waiting or running:
            with threads_for_others(threads):  # a process is started when something is submitted
                while waiting and idle:
                    piece, losses = waiting.popleft()
                    pool, future = _submitted(idle.pop(), work, piece)
                    running[future] = pool, piece, losses
            done = wait(running, return_when=FIRST_COMPLETED).done.pop()
            pool, piece, losses = running.pop(done)
            idle.append(pool)
            error = done.exception()
            if isinstance(error, BrokenProcessPool) and losses < RETRIES:
                waiting.append((piece, losses + 1))
            elif isinstance(error, BrokenProcessPool):
                yield piece, lost(error)
            elif error is None or isinstance(error, NirvanaError):
                yield piece, error or done.result()
            else:
                raise error
    finally:
        for pool in (*idle, *(one for one, *_ in running.values())):
            pool.shutdown(wait=not running, cancel_futures=True)


def _submitted(
    pool: ProcessPoolExecutor, work: Callable[[Piece], Result], piece: Piece
) -> tuple[ProcessPoolExecutor, Future[Result]]:
    """The piece at work in ``pool``, or in a new one where its process was lost."""
    with suppress(BrokenProcessPool):
        return pool, pool.submit(work, piece)
    pool.shutdown()
    pool = _pool()
    return pool, pool.submit(work, piece)


def _pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    return ProcessPoolExecutor(1, mp_context=context)
