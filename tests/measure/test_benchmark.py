from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from builders.tiny import INTERRUPTIBLE
from builders.tiny_decoder import KV_HEADS, VOCAB, write_tiny_decoder
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import Advance, SilentProgress
from nirvana_deploy.export.footprint import Footprint
from nirvana_deploy.measure.benchmark import (
    Variant,
    alternate,
    benchmark,
    precision_cautions,
    speedups,
    summary,
    weights_bytes,
)
from nirvana_deploy.measure.bounds import Mixing, Product, Work
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.worker import RoundSample, WorkerProcess, timed_round

PROMPT = np.array([[3, 1, 4]], dtype=np.int64)


class SleepyDecoder:
    """A decoder of known latency; makes the tokens 1, 2, 3, ... and remembers what it was fed."""

    def __init__(self, *, prefill_s: float, decode_s: float) -> None:
        self.prefill_s = prefill_s
        self.decode_s = decode_s
        self.fed: list[int] = []

    def prefill(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], Any]:
        time.sleep(self.prefill_s)
        return np.eye(9, dtype=np.float32)[[[0] * (tokens.shape[1] - 1) + [1]]], 1

    def decode(self, tokens: NDArray[np.int64], state: Any) -> tuple[NDArray[np.float32], Any]:
        time.sleep(self.decode_s)
        self.fed.append(int(tokens[0, 0]))
        return np.eye(9, dtype=np.float32)[[[state + 1]]], state + 1


class DriftingRunner:
    """A runner whose rounds take ``tpot_ms`` times the machine's slowness, which grows with every call."""

    slowness = 1.0

    def __init__(self, tpot_ms: float, calls: list[str], name: str) -> None:
        self.tpot_ms = tpot_ms
        self.calls = calls
        self.name = name
        self.prompts: list[NDArray[np.int64]] = []

    def measure(self, tokens: NDArray[np.int64], *, new_tokens: int) -> RoundSample:
        self.calls.append(self.name)
        self.prompts.append(tokens)
        slowness = 1.2 ** len(self.calls)
        gap = self.tpot_ms * slowness
        return RoundSample(prefill_ms=3 * gap, ttft_ms=4 * gap, itl_ms=(gap,) * (new_tokens - 1))


class Labels(SilentProgress):
    """Remembers what it was asked to show."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        self.labels.append(label)
        yield lambda steps: None


class SteadyRunner:
    """A runner whose rounds take what it is told."""

    def __init__(self, tpot_ms: list[float]) -> None:
        self.tpot_ms = iter(tpot_ms if len(tpot_ms) > 1 else tpot_ms * 100)

    def measure(self, tokens: NDArray[np.int64], *, new_tokens: int) -> RoundSample:
        gap = next(self.tpot_ms)
        return RoundSample(prefill_ms=gap, ttft_ms=gap, itl_ms=(gap,) * (new_tokens - 1))


def tiny_variant(folder: Path, name: str = "dense", *, linear_parameters: int = 288) -> Variant:
    work = Work(
        linear_parameters=linear_parameters,
        footprint=Footprint(
            weight_bytes_per_step=4 * (linear_parameters + 88),
            kv_cache_bytes_per_token=4 * 2 * 4 * sum(KV_HEADS),
        ),
        products=(Product("new", linear_parameters, "float32"), Product("new", 88, "float32")),
        mixings=(Mixing("new", "new", 12, "float32"),),
        logit_bytes=4 * VOCAB,
    )
    return Variant(name=name, path=folder, parameters=976, embedding_parameters=88, work=work)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_decoder(tmp_path_factory.mktemp("tiny") / "onnx")


@pytest.fixture
def worker(folder: Path) -> Iterator[WorkerProcess]:
    with WorkerProcess("dense", folder, threads=1) as process:
        yield process


def test_a_decoder_of_known_latency_is_measured() -> None:
    """The best of a few rounds: a sleep is never shorter than asked, and longer on a busy machine."""
    decoder = SleepyDecoder(prefill_s=0.04, decode_s=0.01)
    samples = [timed_round(decoder, PROMPT, new_tokens=5) for _ in range(5)]
    assert decoder.fed == [1, 2, 3, 4] * 5
    assert all(len(sample.itl_ms) == 4 for sample in samples)
    assert all(40 <= sample.prefill_ms <= sample.ttft_ms for sample in samples)
    # loose above, for busy machines; prefill counted into decode would already be 20 per token
    assert 40 <= min(sample.ttft_ms for sample in samples) < 50
    assert 10 <= min(sample.tpot_ms for sample in samples) < 15


def test_what_each_interval_covers() -> None:
    """On a clock that ticks once per look: start, after prefill, first id, then one look per token."""
    ticks = iter(range(100))
    decoder = SleepyDecoder(prefill_s=0, decode_s=0)
    sample = timed_round(decoder, PROMPT, new_tokens=4, clock=lambda: next(ticks))
    assert sample == RoundSample(prefill_ms=1000, ttft_ms=2000, itl_ms=(1000, 1000, 1000))
    assert sample.tpot_ms == 1000
    assert sample.e2e_ms == 5000 == sample.ttft_ms + 3 * sample.tpot_ms


def test_a_clock_that_goes_back_is_an_error() -> None:
    """By 3 ms between the second token and the third."""
    looks = iter([0.0, 0.010, 0.011, 0.021, 0.018])
    decoder = SleepyDecoder(prefill_s=0, decode_s=0)
    with pytest.raises(NirvanaError, match=r"clock went back by 3\.00 ms.*\n.*nirvana-deploy benchmark OUT"):
        timed_round(decoder, PROMPT, new_tokens=3, clock=lambda: next(looks))


def test_warm_up_is_left_out_and_the_order_flips() -> None:
    calls: list[str] = []
    runners = {name: DriftingRunner(10, calls, name) for name in "ab"}
    workload = Workload(prompt_tokens=5, new_tokens=3, repeats=3, warmup=2)
    samples = alternate(runners, workload=workload, vocab_size=7)
    assert "".join(calls) == "abbaabbaab"
    assert [len(samples[name]) for name in "ab"] == [3, 3]
    assert samples["a"][0].tpot_ms == pytest.approx(10 * 1.2**5)  # the fifth call is a's first that counts
    for a, b in zip(runners["a"].prompts, runners["b"].prompts, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.shape == (1, 5)
        assert 0 <= a.min() <= a.max() < 7
    assert not np.array_equal(runners["a"].prompts[0], runners["a"].prompts[1])


def test_drift_cancels_from_paired_speedups() -> None:
    """A machine that slows by 20% a call, and a variant twice as fast: ends of the drift differ 30-fold."""
    calls: list[str] = []
    runners = {"dense": DriftingRunner(10, calls, "dense"), "pruned": DriftingRunner(5, calls, "pruned")}
    workload = Workload(prompt_tokens=1, new_tokens=3, repeats=8, warmup=1)
    samples = alternate(runners, workload=workload, vocab_size=7)
    result = speedups(samples["dense"], samples["pruned"])
    for metric in ("prefill", "ttft", "tpot"):
        assert result[f"{metric}_speedup"] == pytest.approx(2, rel=0.02)
        low, high = result[f"{metric}_speedup_p10_p90"]
        assert (low, high) == (pytest.approx(2 / 1.2), pytest.approx(2 * 1.2))


@pytest.mark.parametrize(("minutes", "rounds"), [(10.0, 18), (0.0, 6)])
def test_rounds_go_on_until_the_interval_is_tight_or_the_time_is_over(minutes: float, rounds: int) -> None:
    """Six rounds with one that is disturbed give a wide interval; twelve more of a steady model do not."""
    runners = {"dense": SteadyRunner([20.0]), "pruned": SteadyRunner([10.0, 13.0] * 3 + [10.0] * 90)}
    workload = Workload(
        prompt_tokens=1, new_tokens=3, repeats=6, warmup=0, precision=0.01, max_minutes=minutes
    )
    samples = alternate(runners, workload=workload, vocab_size=7, baseline="dense")
    assert len(samples["pruned"]) == len(samples["dense"]) == rounds
    interval = speedups(samples["dense"], samples["pruned"])["tpot_speedup_interval"]
    assert (interval["low"] == interval["high"] == 2.0) == (minutes > 0)


@pytest.mark.parametrize(("minutes", "rounds"), [(10.0, 7), (0.0, 1)])
def test_a_few_rounds_meet_no_precision(minutes: float, rounds: int) -> None:
    """One round has an interval of no width; that holds the true median by no confidence."""
    runners = {"dense": SteadyRunner([20.0]), "pruned": SteadyRunner([10.0])}
    workload = Workload(
        prompt_tokens=1, new_tokens=3, repeats=1, warmup=0, precision=0.03, max_minutes=minutes
    )
    said = Labels()
    samples = alternate(runners, workload=workload, vocab_size=7, baseline="dense", progress=said)
    assert len(samples["pruned"]) == rounds
    assert said.labels == ["Benchmark", "Benchmark, no interval so far"][: 1 + (minutes > 0)]
    cautions = precision_cautions(samples, workload, baseline="dense")
    assert cautions == ([] if minutes else [PRECISION_MISSED])
    assert not precision_cautions(samples, replace(workload, precision=None), baseline="dense")


PRECISION_MISSED = (
    "±3.0% was asked for; after 1 round a decode speed-up has no interval of 95%. "
    "Give it more time: --max-minutes N."
)


def test_summary_by_hand() -> None:
    assert summary([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "p50": 3.0,
        "p90": pytest.approx(4.6),
        "p95": pytest.approx(4.8),
        "p99": pytest.approx(4.96),
        "mean": 3.0,
        "min": 1.0,
        "max": 5.0,
        "samples": [4.0, 1.0, 3.0, 2.0, 5.0],
    }


def test_integer_products_are_not_compared_with_float_ones(folder: Path) -> None:
    quantized = replace(tiny_variant(folder, "int8"), float_arithmetic=False)
    workload = Workload(prompt_tokens=4, new_tokens=3, repeats=1, warmup=0, threads=1)
    (comparison,) = benchmark([tiny_variant(folder), quantized], workload=workload)["comparisons"]
    assert comparison["bound_prefill_speedup"] is comparison["prefill_share_of_bound"] is None
    assert comparison["bound_tpot_speedup"] == 1


def test_benchmark_end_to_end(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_decoder(tmp_path / "other", seed=1)
    workload = Workload(prompt_tokens=4, new_tokens=5, repeats=3, warmup=1, threads=1)
    variants = [tiny_variant(folder), tiny_variant(other, "pruned", linear_parameters=144)]
    result = benchmark(variants, workload=workload)
    assert result["schema"] == 1
    assert result["workload"] == {
        "prompt_tokens": 4,
        "new_tokens": 5,
        "batch_size": 1,
        "repeats": 3,
        "precision": None,
        "max_minutes": 10.0,
        "wait_until_idle": False,
        "warmup": 1,
        "threads": 1,
        "seed": 0,
    }
    assert len(result["watch"]["samples"]) == 4 and isinstance(result["watch"]["cautions"], list)
    environment = result["environment"]
    assert environment["threads"] == 1
    assert environment["memory_bandwidth_gb_per_s"] > 0.1
    dense, pruned = result["variants"]
    assert (dense["name"], pruned["name"]) == ("dense", "pruned")
    for record in (dense, pruned):
        assert record["runtime"] == "onnxruntime-cpu"
        assert [len(record[f"{metric}_ms"]["samples"]) for metric in ("prefill", "ttft", "tpot", "itl")] == [
            3,
            3,
            3,
            3 * 4,
        ]
        assert 0 < record["prefill_ms"]["p50"] <= record["ttft_ms"]["p50"]
        assert record["decode_tokens_per_s"] == pytest.approx(1000 / record["tpot_ms"]["p50"])
        assert record["interpreter_rss_bytes"] <= record["loaded_rss_bytes"] <= record["peak_rss_bytes"]
        assert record["peak_device_bytes"] is record["quality"] is None
        files = ("model.onnx", "model.onnx.data")
        assert record["weights_bytes"] == sum((Path(record["path"]) / name).stat().st_size for name in files)
    (comparison,) = result["comparisons"]
    assert (comparison["variant"], comparison["baseline"]) == ("pruned", "dense")
    cache_bytes = 6.5 * 96
    bound = (4 * (288 + 88) + cache_bytes) / (4 * (144 + 88) + cache_bytes)
    assert comparison["bound_tpot_speedup"] == pytest.approx(bound)
    share = comparison["tpot_speedup"] / comparison["bound_tpot_speedup"]
    assert comparison["tpot_share_of_bound"] == pytest.approx(share)
    paired = [
        before / after
        for before, after in zip(dense["tpot_ms"]["samples"], pruned["tpot_ms"]["samples"], strict=True)
    ]
    assert comparison["tpot_speedup"] == pytest.approx(np.median(paired))


def test_a_worker_answers_and_ends_with_its_block(folder: Path) -> None:
    with WorkerProcess("dense", folder, threads=1) as worker:
        assert (worker.loaded.vocab_size, worker.loaded.threads) == (VOCAB, 1)
        sample = worker.measure(PROMPT, new_tokens=4)
        assert len(sample.itl_ms) == 3
        assert worker.peak_rss_bytes >= worker.loaded.loaded_rss_bytes
        pid = only_child().pid
    assert not psutil.pid_exists(pid)


def test_a_worker_imports_no_torch(folder: Path) -> None:
    """Its peak memory would be torch's."""
    with WorkerProcess("dense", folder, threads=1):
        maps = Path(f"/proc/{only_child().pid}/maps")
        if not maps.exists():
            pytest.skip("the libraries of another process show in /proc only")
        assert "libtorch" not in maps.read_text()


def test_an_idle_worker_burns_no_cpu(folder: Path) -> None:
    with WorkerProcess("dense", folder, threads=2) as worker:
        worker.measure(PROMPT, new_tokens=4)
        process = only_child()
        time.sleep(0.3)  # the runtime's pool spins for a moment after a run
        before = sum(process.cpu_times()[:2])
        time.sleep(0.5)
        assert sum(process.cpu_times()[:2]) - before <= 0.05


def test_a_killed_worker_is_a_clear_error(worker: WorkerProcess) -> None:
    os.kill(only_child().pid, signal.SIGKILL)
    with pytest.raises(NirvanaError, match=r"'dense' was ended by SIGKILL.*\n.*memory ran out"):
        worker.measure(PROMPT, new_tokens=4)


def test_a_dying_worker_passes_on_its_last_words(worker: WorkerProcess) -> None:
    beyond_int64 = np.array([[1 << 70]], dtype=object)
    with pytest.raises(NirvanaError, match=r"worker of 'dense' exited with 1\.(.|\n)*OverflowError"):
        worker.measure(beyond_int64, new_tokens=4)


def test_a_worker_names_a_token_that_its_model_never_learned(worker: WorkerProcess) -> None:
    beyond_the_vocabulary = np.array([[VOCAB + 5]], dtype=np.int64)
    with pytest.raises(NirvanaError, match=r"^dense: Token id 16 is beyond the model's vocabulary of 11 "):
        worker.measure(beyond_the_vocabulary, new_tokens=4)


@pytest.mark.parametrize("how", ["Ctrl-C", "kill"])
def test_workers_end_with_their_parent(folder: Path, how: str) -> None:
    script = INTERRUPTIBLE + (
        "import sys, pathlib, time; from nirvana_deploy.measure.worker import WorkerProcess\n"
        "with WorkerProcess('dense', pathlib.Path(sys.argv[1]), threads=1) as worker:\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        (child,) = psutil.Process(parent.pid).children()
        if how == "kill":
            parent.kill()
        else:
            os.killpg(parent.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the worker too
        _, words = parent.communicate(timeout=5)
    child.wait(timeout=5)
    assert words.count("Traceback") == (how == "Ctrl-C")  # the parent's KeyboardInterrupt, no worker's


def test_vocabularies_must_agree(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("builders.tiny_decoder.VOCAB", VOCAB + 1)
    wider = write_tiny_decoder(tmp_path / "wider")
    with pytest.raises(NirvanaError, match=r"vocabulary; these differ: \{'dense': 11, 'pruned': 12\}"):
        benchmark([tiny_variant(folder), tiny_variant(wider, "pruned")], workload=Workload(threads=1))


def test_variants_need_distinct_names_and_the_baseline(folder: Path) -> None:
    for names in (["pruned"], ["dense", "dense"]):
        with pytest.raises(NirvanaError, match="distinct names, and one must be 'dense'"):
            benchmark([tiny_variant(folder, name) for name in names], workload=Workload())


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("new_tokens", 1, 2), ("prompt_tokens", 0, 1), ("repeats", 0, 1), ("warmup", -1, 0), ("threads", 0, 1)],
)
def test_a_workload_that_measures_nothing_is_refused(name: str, value: int, least: int) -> None:
    with pytest.raises(NirvanaError, match=f"{name} = {value} is not allowed; .* at least {least}"):
        Workload(**{name: value})


def test_the_bytes_of_an_onnx_folder_are_those_of_the_files_that_are_opened(tmp_path: Path) -> None:
    """Beside it a second graph, as other exporters leave them, and data of a name of its own."""
    folder = write_tiny_decoder(tmp_path / "onnx")
    data = folder / "model.onnx.data"
    expected = weights_bytes(folder)
    assert expected == (folder / "model.onnx").stat().st_size + data.stat().st_size
    shutil.copy(folder / "model.onnx", folder / "model_q4.onnx")
    (folder / "model_q4.onnx_data").write_bytes(b"x" * 99)
    assert weights_bytes(folder) == expected
    model = onnx.load(folder / "model.onnx")
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    data.unlink()
    sizes = [(folder / name).stat().st_size for name in ("model.onnx", "weights.bin")]
    assert weights_bytes(folder) == sum(sizes) and sizes[1] > 1000
    (folder / "model.onnx").write_bytes(b"no graph")
    assert weights_bytes(folder) == 8


def test_the_bytes_of_a_checkpoint_are_those_that_transformers_reads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for size, name in enumerate(("consolidated", "a", "b", "model"), start=1):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x" * 10**size)
    assert weights_bytes(tmp_path) == 10_000
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_bytes(tmp_path) == 1_100


def test_peak_rss_sees_memory_that_was_given_back() -> None:
    script = (
        "import numpy, psutil; from nirvana_deploy.measure.worker import peak_rss_bytes\n"
        "rss_bytes = lambda: psutil.Process().memory_info().rss\n"
        "before = rss_bytes(); numpy.ones(200_000_000, dtype=numpy.uint8)\n"
        "print(before, peak_rss_bytes(), rss_bytes())"
    )
    output = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    before, peak, after = map(int, output.stdout.split())
    assert peak - before == pytest.approx(200e6, rel=0.05)
    assert after < before + 50e6


def only_child() -> psutil.Process:
    (child,) = workers()
    return child


def workers() -> list[psutil.Process]:
    """Children of this process but multiprocessing's tracker, which stays once a pool was used."""
    tracker = "multiprocessing.resource_tracker"
    return [one for one in psutil.Process().children() if not any(tracker in word for word in one.cmdline())]
