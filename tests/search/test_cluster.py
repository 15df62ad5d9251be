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
from typing import Any

import pytest
from builders.extras import needs
from builders.jobs import SHORT
from builders.tiny import write_tiny

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError, install_extra
from nirvana_deploy.pipeline.searching.search import search_points
from nirvana_deploy.search import cluster as clusters
from nirvana_deploy.search.recipe import Search, Where
from nirvana_deploy.search.workers import run_points

HEAD = "127.0.0.2:26379"


def noted(piece: tuple[str, int, float]) -> int:
    """Work that leaves a trace, takes a while, and refuses 3."""
    folder, number, seconds = piece
    with (Path(folder) / str(number)).open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    if number == 3:
        raise NirvanaError("3 is odd.", hint="Try an even one.")
    return number * number


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


def test_without_ray_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError) as refused:
        list(run_points([1], abs, Where(cluster="auto")))
    assert install_extra("cluster") in str(refused.value)


def started(*words: str, folder: Path) -> subprocess.Popen[bytes]:
    """A node of Ray that ends with its process."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", *words]
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
    head = started("--head", "--node-ip-address=127.0.0.2", "--port=26379", *place, folder=logs)
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


@pytest.mark.slow
def test_a_search_on_a_cluster_finds_what_one_here_does(
    nodes: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """To the last digit of every point."""
    model = str(write_tiny(tmp_path / "tiny", "llama-tied"))
    options = {**SHORT, "num_sequences": 4, "seq_len": 16, "run_benchmark": False, "gamma": 1.0}
    points = {}
    for cluster in (None, HEAD):
        recipe = Search(sparsities="0.1,0.2,0.3,0.4", precisions="none,w8", cluster=cluster)
        found = search_points(model, out=tmp_path / f"on-{cluster}", recipe=recipe, **options)
        points[cluster] = [asdict(one) for one in found.points]
    assert points[None] == points[HEAD] and all(one["failed"] is None for one in points[HEAD])


@pytest.mark.slow
def test_a_worker_and_a_node_are_lost_and_every_piece_has_its_result(
    nodes: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    pieces = [(str(traces), number, 4.0) for number in range(6)]
    found = {}
    killed = False
    for piece, result in run_points(pieces, noted, Where(cluster=HEAD)):
        found[piece[1]] = result
        if not killed:
            killed = True
            pid = int((traces / str(max(int(p.name) for p in traces.iterdir()))).read_text().split()[-1])
            os.kill(pid, signal.SIGKILL)  # a worker in the middle of its piece
            ended(nodes.pop())  # and a node
    assert {number: found[number] for number in found if number != 3} == {0: 0, 1: 1, 2: 4, 4: 16, 5: 25}
    refused = found[3]
    assert isinstance(refused, NirvanaError) and refused.hint == "Try an even one."
    assert sum(len(path.read_text().split()) for path in traces.iterdir()) > len(pieces)  # some ran twice
