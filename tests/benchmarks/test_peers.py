"""Peers beside ours: what a table and its verdict say, and that a process of one model answers for it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from builders.extras import needs
from builders.scripts import ROOT
from builders.tiny import VOCABULARY, write_tiny

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.quality import quality_of
from nirvana_deploy.model.checkpoint import Checkpoint, load_checkpoint

WINDOWS = np.random.default_rng(0).integers(0, VOCABULARY, size=(2, 9))


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers

    return peers


@pytest.fixture
def process(page: ModuleType) -> Any:
    return sys.modules["peer_process"]


def model(name: str, kl: float | None, ms: float, weights_bytes: float = 1e6) -> dict[str, Any]:
    return {
        "name": name,
        "made": "by hand",
        "reason": None if kl is not None else "no logits: it gives none",
        "about": {"thing": "1.0"},
        "decode_ms": [ms, ms * 1.01, ms * 0.99, ms, ms, ms],
        "prefill_ms": {"128": [40.0] * 6, "512": [160.0] * 6},
        "weights_bytes": weights_bytes,
        "peak_rss_bytes": 5e8,
        "quality": None if kl is None else {"kl_vs_dense": kl, "perplexity": 20 + kl},
    }


MISSING = {"name": "peer c", "made": "by a wheel", "reason": "No module named 'c'"}
OURS = [
    model("ours: dense", 0.0, 20.0),
    model("ours: dense w8", 0.004, 8.0),
    model("ours: dense w4", 0.1, 4.0),
]
PEERS = [model("peer a", 0.05, 4.0, 2e6), model("peer b", 0.2, 4.5), model("d", None, 9.0), MISSING]
RECORD = {
    "environment": {"threads": 2, "cpu": "a CPU", "load_average_1min": 0.5},
    "quality": {"windows": 2, "window_tokens": 256, "source": "held-out windows"},
    "workload": {"rounds": 6},
    "models": [*PEERS, *OURS],
}


def test_the_table_ranks_by_decode_and_says_why_a_peer_is_not_in_it(page: ModuleType, tmp_path: Path) -> None:
    lines = page.table(RECORD).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "peer a",
        "ours: dense w4",
        "peer b",
        "ours: dense w8",
        "d",
        "ours: dense",
        "peer c",
    ]
    assert "| ours: dense w4 | 0.1000 | 20.10 | 1 | 4.00 | 5.00 (5.00 to 5.00) | 40 | 160 | 500 |" in lines
    assert lines[-1].startswith("| peer c | not run: No module named 'c' |")
    assert "| d | no logits: it gives none |" in lines[6]
    widths = {line.count("|") for line in lines}
    assert widths == {10}
    page.draw(RECORD, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_the_verdict_compares_with_ours_of_the_same_quality_alone(page: ModuleType) -> None:
    said = page.verdict(RECORD)
    assert "peer a is 2.00 times as fast as ours: dense w8" in said and "2 MB against 1" in said
    assert "peer b" not in said  # as good as w4 of ours, which is faster
    assert page.verdict({"models": OURS}).startswith("No peer is beyond doubt faster")
    few = [{**one, "decode_ms": one["decode_ms"][:3]} for one in [*PEERS[:2], *OURS]]
    assert page.verdict({"models": few}).startswith("No peer is beyond doubt faster")  # too few rounds
    assert "peer a: by hand (thing 1.0)." in page.section(RECORD)


@pytest.mark.parametrize("kind", ["transformers", "onnxruntime-genai"])
def test_a_process_answers_for_its_model(page: ModuleType, process: Any, tmp_path: Path, kind: str) -> None:
    dense = write_tiny(tmp_path / "dense", "llama-tied")
    folder = dense
    if kind == "onnxruntime-genai":
        needs("onnxruntime_genai")
        folder = tmp_path / "onnx"
        onnx_from_checkpoint(Checkpoint.open(dense), folder)
    command = [sys.executable, str(ROOT / "benchmarks" / "peer_worker.py"), kind, str(folder), "1"]
    with process.PeerProcess(command, threads=1) as peer:
        found = peer.logits(WINDOWS, tmp_path / "logits")
        sample = peer.measure(WINDOWS[:1], new_tokens=4)
        assert peer.peak_rss_bytes > 1e6 and all(peer.about.values())
    assert sample.ttft_ms > 0 and len(sample.itl_ms) == 3 and min(sample.itl_ms) > 0
    with torch.no_grad():
        wanted = load_checkpoint(dense)(torch.from_numpy(WINDOWS[:, :-1])).logits.numpy()
    assert np.abs(found - wanted).max() < 1e-4
    runner, other = page.Saved(WINDOWS, wanted), page.Saved(WINDOWS, found)
    quality = quality_of(runner, {"other": other}, WINDOWS, baseline_name="dense")
    assert abs(quality["other"]["kl_vs_dense"]) < 1e-6 and quality["other"]["tokens"] == 16


def test_what_does_not_run_says_why_without_folders(process: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"raise ValueError('no model in {tmp_path}/deep/model.onnx | here')"]
    with pytest.raises(NirvanaError) as caught, process.PeerProcess(command, threads=1):
        pass
    assert str(caught.value) == "ValueError: no model in model.onnx / here"
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 8)"]
    with pytest.raises(NirvanaError, match="ended by SIGFPE"), process.PeerProcess(command, threads=1):
        pass
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    hangs = process.PeerProcess(command, threads=1, limit_s=0.2)
    with pytest.raises(NirvanaError, match=r"no answer within 0\.2 s"), hangs:
        pass
    assert process.last_words("") == "it ended without a word"
