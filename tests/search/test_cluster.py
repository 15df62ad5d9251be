"""The same work on a Ray cluster of two nodes on this machine, one of which is taken away."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest
from builders.extras import needs
from builders.jobs import SHORT
from builders.pieces import halved, surroundings
from builders.tiny import write_tiny

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError, install_extra
from nirvana_deploy.pipeline.alone.calibration import select_calibration
from nirvana_deploy.pipeline.searching.search import search_points
from nirvana_deploy.prune.recipe import Selection as Candidates
from nirvana_deploy.search import cluster as clusters
from nirvana_deploy.search.recipe import Search, Where
from nirvana_deploy.search.workers import run_points

HEAD = "127.0.0.2:26379"
CLIENT = "ray://127.0.0.2:26380"
ENOUGH = ("--num-cpus=2", "--num-gpus=1")
"""Of each node; there need be no such GPU."""


def test_an_address_that_does_not_answer_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("ray")
    monkeypatch.setattr(clusters, "_SECONDS", 0.2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(NirvanaError, match=f"Nothing answers at 127.0.0.1:{port}"):
        list(run_points([1], abs, Where(cluster=f"127.0.0.1:{port}")))
    with pytest.raises(NirvanaError, match="is no address; it takes auto, HOST:PORT"):
        list(run_points([1], abs, Where(cluster="somewhere")))


class Stand:
    """What a cluster's address is asked of Ray: what ``init`` got, and how long it takes."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        self.asked: dict[str, Any] = {}
        self.left = Event()

    def init(self, **how: Any) -> None:
        self.asked = how
        time.sleep(self.seconds)

    def shutdown(self) -> None:
        self.left.set()


def test_a_cluster_that_says_nothing_is_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """And left, if it answers in the end."""
    monkeypatch.setattr(clusters, "_SECONDS", 0.1)
    stand = Stand(seconds=0.5)
    with (
        pytest.raises(NirvanaError, match=r"No Ray cluster answers at auto: it says nothing in 0 s\."),
        clusters._connected(stand, "auto"),
    ):
        pass
    assert stand.left.wait(timeout=60)


def test_a_loopback_address_is_said_to_a_node_and_not_to_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_require_answer", lambda place: None)
    for address, place in ((HEAD, "127.0.0.2"), (f"ray://{HEAD}", None), ("10.0.0.7:6379", None)):
        stand = Stand()
        with clusters._connected(stand, address):
            assert stand.asked["address"] == address
            assert stand.asked.get("_node_ip_address") == place


def test_gpus_without_a_cluster_are_refused_before_any_work(tmp_path: Path) -> None:
    for asked in (
        lambda: search_points("smollm2", out=tmp_path / "out", recipe=Search(gpus_per_cut=1)),
        lambda: select_calibration(
            "smollm2", Candidates(corpora="pydoc", sparsity=0.2), Where(gpus_per_cut=1)
        ),
    ):
        with pytest.raises(NirvanaError, match="--gpus-per-cut 1 is for a cluster"):
            asked()
    assert not list(tmp_path.iterdir())


def test_without_ray_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError) as refused:
        list(run_points([1], abs, Where(cluster="auto")))
    assert install_extra("cluster") in str(refused.value)


def started(*words: str, folder: Path) -> subprocess.Popen[bytes]:
    """A node of Ray that ends with its process."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *ENOUGH, *words]
    few = ["--object-store-memory=80000000", "--disable-usage-stats"]
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join([tests, str(Path(__file__).parent), *sys.path])
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [*command, *few],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ
            | {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"},
        )


def ended(node: subprocess.Popen[bytes]) -> None:
    """End a node and all of its processes."""
    os.killpg(node.pid, signal.SIGKILL)
    node.wait()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[subprocess.Popen[bytes]]]:
    needs("ray")
    logs = tmp_path_factory.mktemp("logs")
    short = tempfile.mkdtemp(prefix="ray")  # names of its sockets may have 107 bytes
    place = ["--include-dashboard=false", f"--temp-dir={short}"]
    head = started(
        "--head",
        "--node-ip-address=127.0.0.2",
        "--port=26379",
        "--ray-client-server-port=26380",
        *place,
        folder=logs,
    )
    running = [head]
    try:
        for _ in range(60):
            time.sleep(2)
            if alive(needs("ray")):
                break
        running.append(started(f"--address={HEAD}", "--node-ip-address=127.0.0.3", folder=logs))
        for _ in range(60):
            if alive(needs("ray")) == 2:
                break
            time.sleep(2)
        assert alive(needs("ray")) == 2, (logs / "log").read_text()[-2000:]
        yield running
    finally:
        for node in running:
            if node.poll() is None:
                ended(node)
        shutil.rmtree(short, ignore_errors=True)


def alive(ray: Any) -> int:
    """Nodes of the cluster that are there; a head that has just begun does not answer."""
    with suppress(NirvanaError), clusters._connected(ray, HEAD):
        return sum(bool(node["Alive"]) for node in ray.nodes())
    return 0


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """A model and the points of a search on it in this process."""
    folder = tmp_path_factory.mktemp("here")
    model = str(write_tiny(folder / "tiny", "llama-tied"))
    return model, points_of(model, folder / "search", cluster=None)


def points_of(model: str, out: Path, *, cluster: str | None) -> list[dict[str, Any]]:
    recipe = Search(sparsities="0.1,0.2,0.3,0.4", precisions="none,w8", cluster=cluster, cpus_per_cut=2)
    options = {**SHORT, "num_sequences": 4, "seq_len": 16, "run_benchmark": False, "gamma": 1.0}
    return [asdict(one) for one in search_points(model, out=out, recipe=recipe, **options).points]


@pytest.mark.slow
@pytest.mark.parametrize("address", [HEAD, CLIENT])
def test_a_piece_has_its_result_its_threads_and_its_gpus(
    nodes: list[subprocess.Popen[bytes]], address: str
) -> None:
    found = dict(run_points([2, 3, 4], halved, Where(cluster=address)))
    assert {2: found[2], 4: found[4]} == {2: 1, 4: 2}
    refused = found[3]
    assert isinstance(refused, NirvanaError) and refused.hint == "Try an even one."
    for cpus, gpus in ((1, 0), (2, 1)):
        where = Where(cluster=address, cpus_per_cut=cpus, gpus_per_cut=gpus)
        assert dict(run_points([1], surroundings, where)) == {1: (cpus, gpus)}
    with pytest.raises(NirvanaError, match="has 1 CPUs and 9 GPUs for a cut; its nodes have 2 CPUs and 1 G"):
        list(run_points([1], abs, Where(cluster=address, gpus_per_cut=9)))


def workers_of(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Its processes that do a piece at this moment."""
    found = []
    for one in psutil.Process(node.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # one that ends hides no other
            if one.cmdline()[:1] == ["ray::_tried"]:
                found.append(one)
    return found


def lose_a_worker_and_a_node(nodes: list[subprocess.Popen[bytes]], out: Path) -> None:
    """As soon as both nodes make a cut behind the first, kill a worker of one, and the other."""
    head, other = nodes
    while not ((out / "s0.2").exists() and workers_of(head) and workers_of(other)):
        time.sleep(0.05)
    workers_of(head)[0].kill()
    ended(other)
    nodes.remove(other)


@pytest.mark.slow
def test_a_search_that_loses_a_worker_and_a_node_finds_what_one_here_does(
    nodes: list[subprocess.Popen[bytes]], here: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """To the last digit of every point."""
    model, points = here
    out = tmp_path / "search"
    losing = Thread(target=lose_a_worker_and_a_node, args=(nodes, out), daemon=True)
    losing.start()
    found = points_of(model, out, cluster=HEAD)
    losing.join(timeout=1)
    assert not losing.is_alive() and len(nodes) == 1
    assert found == points and all(one["failed"] is None for one in found)
