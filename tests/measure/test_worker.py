"""What a worker tells of its memory is what the operating system accounts to its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from builders.tiny_decoder import write_tiny_decoder

from nirvana_deploy.measure.worker import WorkerProcess

PARENT = f"""
import os, signal, sys
from pathlib import Path
import numpy as np
from {WorkerProcess.__module__} import WorkerProcess

with WorkerProcess("dense", Path(sys.argv[1]), threads=1) as worker:
    worker.measure(np.zeros((8192, 32), dtype=np.int64), new_tokens=2)
    told = worker.peak_rss_bytes
    os.kill(worker._process.pid, signal.SIGKILL)
    _, _, usage = os.wait4(worker._process.pid, 0)
print(told, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
"""A process of its own, smaller than the worker: a child's ru_maxrss begins with what it was forked from."""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no wait4")
def test_the_peak_that_a_worker_tells_is_within_3_percent_of_the_systems(tmp_path: Path) -> None:
    folder = write_tiny_decoder(tmp_path / "onnx")
    done = subprocess.run(
        [sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    told, accounted = map(int, done.stdout.split())
    assert told > 100e6 and told == pytest.approx(accounted, rel=0.03)
