"""The same pieces of work on a Ray cluster: a worker or a node that is lost has its pieces done again."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from types import ModuleType
from typing import Any, TypeVar

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.machine import threads_for_others

Piece = TypeVar("Piece")
Result = TypeVar("Result")
AUTO = "auto"
_SECONDS = 30.0
"""For an address to answer."""
RETRIES = 3
"""Of a piece whose worker was lost."""


def run_on_cluster(
    pieces: Sequence[Piece], work: Callable[[Piece], Result], cluster: str, *, cpus: int = 1, gpus: int = 0
) -> Iterator[tuple[Piece, Result | NirvanaError]]:
    """As ``run_points``, on the cluster at ``cluster``: HOST:PORT, ray://HOST:PORT, or auto for one here.

    Nodes see the same files and have this package. A piece has ``cpus`` threads and sees ``gpus`` GPUs.
    Raises NirvanaError where Ray is not installed, the address does not answer, or no node has as many.
    """
    ray = _ray()
    with _connected(ray, cluster):
        _require_node(ray, cluster, cpus=cpus, gpus=gpus)
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(_tried)
        running = {remote.remote(pickle.dumps((work, piece)), cpus): piece for piece in pieces}
        try:
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                piece = running.pop(done)
                yield piece, _outcome(ray, done)
        finally:
            for left in running:
                ray.cancel(left, force=True)


def lost(error: Exception) -> NirvanaError:
    """Why a piece has no result whose worker was lost each time."""
    said = str(error).strip().partition("\n")[0].rstrip(".")
    return NirvanaError(
        f"Its worker was lost {RETRIES + 1} times: {said}.",
        hint="Was there memory for it? Fewer at a time take less: --processes, or more --cpus-per-cut.",
    )


def _tried(packed: bytes, threads: int) -> tuple[Any, NirvanaError | None]:
    """(the result, None), or (None, what went wrong), of a pickled work and piece."""
    with threads_for_others(threads):
        work, piece = pickle.loads(packed)  # imports torch, which counts its threads then
        try:
            return work(piece), None
        except NirvanaError as error:
            return None, error


def _outcome(ray: ModuleType, done: Any) -> Any:
    losses = ray.exceptions
    try:
        result, refused = ray.get(done)
    except (
        losses.WorkerCrashedError,
        losses.NodeDiedError,
        losses.ObjectLostError,
        losses.OutOfMemoryError,
    ) as error:
        return lost(error)
    return result if refused is None else refused


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports home otherwise
    try:
        import ray
    except ImportError:
        raise MissingExtraError("--cluster", package="ray", extra="cluster") from None
    module: ModuleType = ray
    return module


@contextmanager
def _connected(ray: ModuleType, cluster: str) -> Iterator[None]:
    """Within the block this process is a client of the cluster."""
    if cluster != AUTO:
        _require_answer(cluster.removeprefix("ray://"))
    # Ray takes the host's own address for a loopback one; its client, at ray://, has no place among the nodes
    beside = {"_node_ip_address": cluster.rpartition(":")[0]} if cluster.startswith("127.") else {}
    how = {"address": cluster, "log_to_driver": False, "logging_level": "error", **beside}
    answer = _begun(ray, **how)
    try:
        answer.result(_SECONDS)
    except (TimeoutError, ConnectionError, ImportError, RuntimeError, ValueError) as error:
        answer.cancel()
        said = str(error).strip().partition("\n")[0].rstrip(".") or f"it says nothing in {_SECONDS:.0f} s"
        raise NirvanaError(
            f"No Ray cluster answers at {cluster}: {said}.",
            hint="Start one: ray start --head. HOST:PORT is its port 6379, ray://HOST:PORT its port 10001.",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _begun(ray: ModuleType, **how: Any) -> Future[None]:
    """``ray.init`` in a thread that ends with this process; once cancelled, it does not stay connected."""
    answer: Future[None] = Future()

    def connect() -> None:
        try:
            ray.init(**how)
        except BaseException as error:  # raised again where the answer is asked for
            if not answer.cancelled():
                answer.set_exception(error)
            return
        if answer.cancelled():
            ray.shutdown()
        else:
            answer.set_result(None)

    Thread(target=connect, daemon=True).start()
    return answer


def _require_node(ray: ModuleType, cluster: str, *, cpus: int, gpus: int) -> None:
    """Raise NirvanaError where no node has what a piece asks for: Ray would wait for one without a word."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        return
    have = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    raise NirvanaError(
        f"No node of {cluster} has {cpus} CPUs and {gpus} GPUs for a cut; its nodes have {have}.",
        hint="Ask for less: --cpus-per-cut, --gpus-per-cut.",
    )


def _require_answer(place: str) -> None:
    """Raise NirvanaError unless something listens at HOST:PORT."""
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise NirvanaError(f"--cluster {place!r} is no address; it takes auto, HOST:PORT or ray://HOST:PORT.")
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except OSError as error:
        raise NirvanaError(
            f"Nothing answers at {place} within {_SECONDS:.0f} s: {error.strerror or error}.",
            hint="Is the cluster's head there, and its port open? ray status --address HOST:PORT",
        ) from None
