"""Workloads through servers of a tiny model, each a real one in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from builders.extras import needs

for module in ("fastapi", "uvicorn", "prometheus_client"):
    needs(module)

from builders.serving import write_served  # noqa: E402

from nirvana_deploy.base.child import KEY_VARIABLE, child_environment  # noqa: E402
from nirvana_deploy.base.errors import NirvanaError  # noqa: E402
from nirvana_deploy.base.reading import typed  # noqa: E402
from nirvana_deploy.export.footprint import Footprint  # noqa: E402
from nirvana_deploy.measure.benchmark import Variant  # noqa: E402
from nirvana_deploy.measure.bounds import Work  # noqa: E402
from nirvana_deploy.measure.workloads.named import NamedWorkload, WorkloadFile  # noqa: E402
from nirvana_deploy.measure.workloads.server import ServerProcess  # noqa: E402
from nirvana_deploy.measure.workloads.session import measure_workload  # noqa: E402
from nirvana_deploy.output.kinds.workloads import TimedWorkload  # noqa: E402

pytestmark = pytest.mark.integration
WORK = Work(1, Footprint(1, kv_cache_bytes_per_token=100), (), (), logit_bytes=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, "s3cret")  # which the child does not get
        with ServerProcess(
            "tiny", folder, ("--threads", "1", "--slots", "2", "--max-new-tokens", "9")
        ) as one:
            yield one
    assert one.exit_code == 0


def asked(*lengths: tuple[int, int]) -> list[tuple[Any, int]]:
    random = np.random.default_rng(0)
    return [(random.integers(0, 272, size=prompt), new) for prompt, new in lengths]


def test_every_answer_has_its_length_and_its_times(server: ServerProcess) -> None:
    samples, seconds = server.answer_all(asked((7, 9), (3, 2), (30, 5), (4, 9), (5, 3)), clients=2)
    assert [len(one.itl_ms) for one in samples] == [8, 1, 4, 8, 2]
    for one in samples:
        assert one.ttft_ms > 0 and min(one.itl_ms) >= 0 and one.e2e_ms <= 1e3 * seconds
    assert (server.vocab_size, server.slots) == (272, 2) and server.peak_rss_bytes > 1e7
    assert server.load_ms > 0


def test_a_request_that_is_refused_is_an_error_with_the_servers_words(folder: Path) -> None:
    said = r"tiny: the server refused a request: 9 tokens are asked for"
    server = ServerProcess("tiny", folder, ("--threads", "1", "--max-new-tokens", "4"))
    with server, pytest.raises(NirvanaError, match=said):
        server.answer_all(asked((3, 4), (3, 9)), clients=2)
    assert server.exit_code == -signal.SIGKILL  # its other clients were not waited for


def test_a_server_that_dies_or_does_not_start_is_an_error_with_its_last_words(
    folder: Path, tmp_path: Path
) -> None:
    with ServerProcess("tiny", folder, ("--threads", "1")) as one:
        os.kill(one.pid, signal.SIGKILL)
        with pytest.raises(NirvanaError, match=r"The server of 'tiny' was ended by SIGKILL"):
            one.answer_all(asked((3, 4)), clients=1)
    with pytest.raises(NirvanaError, match=r"The server of 'none' exited with 1\. It last said: Error: "):
        ServerProcess("none", tmp_path).__enter__()


def test_no_server_is_left_when_its_parent_was_killed(folder: Path) -> None:
    script = (
        "import pathlib, time\nfrom nirvana_deploy.measure.workloads.server import ServerProcess\n"
        f"with ServerProcess('tiny', pathlib.Path({str(folder)!r}), ('--threads', '1')) as one:\n"
        "    print(one.pid, flush=True)\n    time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=child_environment(), text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    child.wait(timeout=60)


def test_a_workload_goes_through_servers_in_rounds_in_turn(folder: Path, tmp_path: Path) -> None:
    models = [
        Variant("dense", folder, 976, 88, WORK),
        Variant("pruned", folder, 976, 88, WORK),
        Variant("broken", tmp_path, 976, 88, WORK),
    ]
    file = WorkloadFile(prompt_tokens=(4, 12), new_tokens=(3, 5), requests=14, concurrency=2)
    found = measure_workload(models, NamedWorkload("at-once", file), threads=1)
    assert typed(found, TimedWorkload, "the record") is found
    assert found["file"]["concurrency"] == 2 and found["environment"]["threads"] == 1
    assert len(found["watch"]["samples"]) == 7  # the longest ahead, then six rounds
    dense, pruned = found["variants"]
    for one in (dense, pruned):
        assert len(one["batches"]) == 14 and len(one["round_seconds"]) == 6
        assert one["seconds"] == sum(one["round_seconds"])
        assert one["requests_per_s"] == 14 / one["seconds"]
        assert one["slots"] == 2 and one["kv_cache_bytes"] == 2 * (12 + 5 - 1) * 100
        assert one["peak_rss_bytes"] > 1e7 and one["load_ms"] > 0 and "prefill_ms" not in one
        assert sum(batch["new_tokens"] - 1 - len(batch["itl_ms"]) for batch in one["batches"]) == 0
        # two clients are at work all the time, but for the ends of rounds
        assert one["seconds"] < sum(batch["ttft_ms"] + sum(batch["itl_ms"]) for batch in one["batches"]) / 1e3
    assert [batch["prompt_tokens"] for batch in dense["batches"]] == [
        batch["prompt_tokens"] for batch in pruned["batches"]
    ]
    (ratio,) = found["comparisons"]
    by_hand = np.divide(dense["round_seconds"], pruned["round_seconds"])
    assert ratio["rate_speedup"]["p50"] == pytest.approx(np.median(by_hand))
    assert ratio["ttft_speedup"]["confidence"] > 0.95
    (failed,) = found["failed"]
    assert failed["name"] == "broken" and "The server of 'broken' exited with 1" in failed["reason"]


def test_where_no_server_starts_the_first_error_is_raised(tmp_path: Path) -> None:
    model = Variant("broken", tmp_path, 976, 88, WORK)
    file = WorkloadFile(prompt_tokens=4, new_tokens=3, requests=2, concurrency=2)
    with pytest.raises(NirvanaError, match="The server of 'broken' exited with 1"):
        measure_workload([model], NamedWorkload("x", file), threads=1)
