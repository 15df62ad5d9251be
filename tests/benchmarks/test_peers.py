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
from safetensors.numpy import save_file

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
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
    "watch": {"cautions": ["The machine was busy."]},
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
    assert "| ours: dense | 0.0000 | 20.00 | 1 | 20.00 | reference | 40 | 160 | 500 |" in lines
    noisy = {**OURS[0], "name": "again", "decode_ms": [19.0, 21.0, 20.0, 20.0, 20.0, 20.0]}
    assert "no difference shown (0.96 to 1.05)" in page.table({"models": [OURS[0], noisy]})
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
    assert page.section(RECORD).startswith("Caution: The machine was busy.\n\n| model |")


@pytest.mark.parametrize("kind", ["transformers", "onnxruntime-genai"])
def test_a_process_answers_for_its_model(page: ModuleType, process: Any, tmp_path: Path, kind: str) -> None:
    dense = write_tiny(tmp_path / "dense", "llama-tied")
    folder = dense
    if kind == "onnxruntime-genai":
        needs("onnxruntime_genai")
        folder = tmp_path / "onnx"
        onnx_from_checkpoint(Checkpoint.open(dense), folder)
    command = [sys.executable, str(ROOT / "benchmarks" / "peer_worker.py"), kind, str(folder), "1"]
    with process.PeerProcess(command, threads=1, limit_s=60) as peer:
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
    with pytest.raises(NirvanaError) as caught, process.PeerProcess(command, threads=1, limit_s=60):
        pass
    assert str(caught.value) == "ValueError: no model in model.onnx / here"
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 8)"]
    with (
        pytest.raises(NirvanaError, match="ended by SIGFPE"),
        process.PeerProcess(command, threads=1, limit_s=60),
    ):
        pass
    assert process.last_words("") == "it ended without a word"


HANGS = """
import subprocess, sys
print('{"about": {}, "peak_rss_bytes": 1}', flush=True)
subprocess.run(["sleep", "600"])
"""


def test_a_peer_that_hangs_is_ended_with_its_children_and_named(process: Any) -> None:
    command = [sys.executable, "-c", HANGS]
    with process.PeerProcess(command, threads=1, limit_s=4) as peer:
        with pytest.raises(NirvanaError, match="took longer than 0"):
            peer.measure(WINDOWS[:1], new_tokens=4)
        with pytest.raises(NirvanaError, match="took longer"):  # and says so again
            peer.measure(WINDOWS[:1], new_tokens=4)


FAKE = """
import json, sys, time
print('{"about": {}, "peak_rss_bytes": 1}', flush=True)
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    if number == int(sys.argv[1]):
        time.sleep(600)
    if "windows" in request:
        rows, positions = len(request["windows"]), len(request["windows"][0]) - 1
        with open(request["file"], "wb") as file:
            file.write(bytes(4 * rows * positions * int(sys.argv[2])))
    times = {"ttft_ms": 2.0, "itl_ms": [1.0] * (request.get("new_tokens", 2) - 1)}
    print(json.dumps({**times, "peak_rss_bytes": 1}), flush=True)
"""


def test_a_peer_that_hangs_takes_no_other_with_it(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = write_tiny(tmp_path / "dense", "llama-tied")
    write_json(tmp_path / "manifest.json", {"model": {"path": str(dense)}})
    windows = {"calibration": WINDOWS, "heldout": WINDOWS}
    save_file(windows, tmp_path / "calibration.safetensors")
    hangs_at = {page.BASELINE: -1, "at once": 0, "in the first prompt": 3, "in the second": 5, "never": -1}

    class Fake(page.Artifact):  # type: ignore[misc, name-defined]
        def command(self, places: Any, threads: int) -> list[str]:
            return [sys.executable, "-c", FAKE, str(hangs_at[self.name]), str(VOCABULARY)]

    fakes = [Fake(name, "fake", dense, "by hand") for name in hangs_at]
    monkeypatch.setattr(page, "artifacts", lambda places: fakes)
    words = ["peers", str(tmp_path), "--limit", "0.05", "--rounds", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(tmp_path / "peers.json")])
    page.main()
    record = read_json(tmp_path / "peers.json")
    models = {one["name"]: one for one in record["models"]}
    late = "ended, for it took longer than 0.05 minutes"
    assert models["at once"]["reason"] == f"no logits: {late}"
    assert models["in the first prompt"]["reason"] == models["in the second"]["reason"] == late
    assert [name for name, one in models.items() if "decode_ms" in one] == [
        page.BASELINE,
        "in the second",
        "never",
    ]
    assert list(models["in the second"]["prefill_ms"]) == ["128"]
    assert models["never"]["reason"] is None and models["never"]["quality"]["kl_vs_dense"] == 0
    assert f"| 2 | {late} | 0 |" in page.table(record)
    assert record["watch"]["samples"][0]["read_gb_per_s"] > 0


def test_a_promise_is_kept_missed_or_not_decided_by_its_interval(page: ModuleType) -> None:
    def timed(name: str, *decode_ms: float) -> dict[str, Any]:
        return {"name": name, "decode_ms": list(decode_ms), "prefill_ms": {}}

    others = [
        timed("onnxruntime-genai builder int4", *[20.0] * 9),
        timed("llama.cpp q4_0", *[12.0] * 9),
        timed("ours: pruned in llama.cpp q4_0", 8, 12, 8, 12, 8, 12, 8, 12, 10),
    ]
    found = page.promises({"models": [timed("ours: pruned-w4", *[10.0] * 9), *others]})
    assert [line.partition(":")[0] for line in found] == ["- kept", "- missed", "- not decided"]
