"""The same pieces of work on a Ray cluster: a worker or a node that is lost has its pieces done again."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError

Piece = TypeVar("Piece")
Result = TypeVar("Result")
AUTO = "auto"
_SECONDS = 30.0
"""For an address to answer."""
_RETRIES = 3
"""Of a piece whose worker was lost."""


def run_on_cluster(
    pieces: Sequence[Piece], work: Callable[[Piece], Result], cluster: str
) -> Iterator[tuple[Piece, Result | NirvanaError]]:
    """As ``run_points``, on the cluster at ``cluster``: HOST:PORT, ray://HOST:PORT, or auto for one here.

    Nodes see the same files and have this package. Raises NirvanaError where Ray is not installed or the
    address does not answer.
    """
    ray = _ray()
    with _connected(ray, cluster):
        remote = ray.remote(max_retries=_RETRIES)(_tried)
        running = {remote.remote(work, piece): piece for piece in pieces}
        try:
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                piece = running.pop(done)
                yield piece, _outcome(ray, done)
        finally:
            for left in running:
                ray.cancel(left, force=True)


def _tried(work: Callable[[Any], Any], piece: Any) -> tuple[Any, tuple[str, str | None] | None]:
    """(the result, None), or (None, message and hint of what went wrong)."""
    try:
        return work(piece), None
    except NirvanaError as error:
        return None, (error.message, error.hint)


def _outcome(ray: ModuleType, done: Any) -> Any:
    try:
        result, refused = ray.get(done)
    except ray.exceptions.WorkerCrashedError as error:
        return NirvanaError(f"Its worker was lost {_RETRIES + 1} times: {error}.")
    return result if refused is None else NirvanaError(refused[0], hint=refused[1])


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
    place = cluster.removeprefix("ray://")
    if cluster != AUTO:
        _require_answer(place)
    client = cluster if cluster.startswith("ray://") else place
    # Ray takes the host's own address for a loopback one
    beside = {"_node_ip_address": place.rpartition(":")[0]} if place.startswith("127.") else {}
    try:
        ray.init(address=client, log_to_driver=False, logging_level="error", **beside)
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise NirvanaError(
            f"No Ray cluster answers at {cluster}: {said}.", hint="Start one: ray start --head"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


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
