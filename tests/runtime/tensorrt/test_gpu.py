"""What only a GPU can show: engines compute what ONNX Runtime computes, in the memory that was planned.

Skipped, with the driver's reason, where there is no GPU; ``benchmarks/gpu.py`` runs these and more.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from builders.extras import needs
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.engine.build import engine_from_onnx
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.stage import engines_from_onnx_folder
from nirvana_deploy.engine.targets import BuilderOptions
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.worker import WorkerProcess
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.onnxruntime.encoder_decoder import OrtSeq2Seq
from nirvana_deploy.runtime.onnxruntime.providers import available
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.runner import greedy_tokens
from nirvana_deploy.runtime.table import RUNTIMES
from nirvana_deploy.runtime.tensorrt.cuda import CudaDevice
from nirvana_deploy.runtime.tensorrt.decoder import TensorRTRunner
from nirvana_deploy.runtime.tensorrt.encoder_decoder import TensorRTSeq2Seq
from nirvana_deploy.runtime.tensorrt.memory import plan_memory
from nirvana_deploy.runtime.tensorrt.record import read_engine_record
from nirvana_deploy.verify.cases import engine_cases, random_prompts
from nirvana_deploy.verify.compare import compare_runners
from nirvana_deploy.verify.tolerance import device_tolerance

pytestmark = pytest.mark.gpu
LENGTHS = Lengths(max_batch=3, max_length=96, opt_prompt=16, opt_length=48)
FLAVORS = {"concat": "portable", "in-place": "static-cache"}
SLACK_BYTES = 64 << 20
"""What the driver and TensorRT may keep for themselves."""


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt"])
def runtime(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    pytest.importorskip(name.replace("-", "_"), reason=f"needs the package {name}")
    return name


@pytest.fixture(scope="module")
def target() -> str:
    with CudaDevice() as device:
        return device.compute_capability


@pytest.fixture(scope="module", params=FLAVORS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["llama-tied", "qwen3"])
def folder(request: pytest.FixtureRequest, form: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp16 ONNX folder."""
    root = tmp_path_factory.mktemp(f"gpu-{form}")
    write_tiny(root / "checkpoint", request.param)
    in_place = form == "in-place"
    onnx_from_checkpoint(
        Checkpoint.open(root / "checkpoint"),
        root / "onnx",
        dtype="fp16",
        flavor=FLAVORS[form],
        cache_tokens=LENGTHS.max_length if in_place else None,
    )
    return root / "onnx"


@pytest.fixture(scope="module")
def engine(folder: Path, runtime: str, target: str) -> Path:
    targets = (target,) if runtime == "tensorrt-rtx" else None
    return build(folder, runtime, targets)


def build(folder: Path, runtime: str, targets: tuple[str, ...] | None) -> Path:
    out = folder.parent / "-".join((runtime, *(targets or ())))
    options = BuilderOptions(runtime, targets=targets)
    return engine_from_onnx(folder, out, lengths=LENGTHS, options=options).path


@pytest.fixture
def runner(engine: Path) -> Iterator[TensorRTRunner]:
    with TensorRTRunner(engine) as opened:
        yield opened


def test_an_engine_computes_what_onnxruntime_does_at_the_corners_of_its_profiles(
    runner: TensorRTRunner, engine: Path, folder: Path
) -> None:
    reference = OrtDecoder(folder, in_float32=True)
    report = compare_runners(
        reference,
        runner,
        cases=engine_cases(read_engine_record(engine), vocab_size=runner.vocab_size),
        tolerance=device_tolerance("fp16", layers=len(reference.kv_heads)),
        prompts=random_prompts(runner.vocab_size),
    )
    assert report.passed, report


def test_decode_runs_as_a_graph_where_its_addresses_stay(runner: TensorRTRunner, form: str) -> None:
    greedy_tokens(runner, np.array([[5, 6, 7]]), max_new_tokens=8)
    assert runner.graph_refused is None
    assert runner._session is not None
    contexts = runner._session._contexts.values()
    assert any(context.graph for context in contexts) == (form == "in-place")


def test_device_memory_is_what_was_planned_and_all_of_it_comes_back(engine: Path) -> None:
    record = read_engine_record(engine)
    with CudaDevice() as device:
        before, _ = device.memory_bytes()
        with TensorRTRunner(engine) as runner:
            started = runner.peak_device_bytes()
            greedy_tokens(runner, np.array([[5, 6, 7]]), max_new_tokens=40)
            planned = plan_memory(record).device_bytes
            assert (
                planned <= started <= planned + record.engine_bytes + runner._scratch.size_bytes + SLACK_BYTES
            )
            assert runner.peak_device_bytes() <= started + SLACK_BYTES
        after, _ = device.memory_bytes()
    assert before - after <= SLACK_BYTES


def test_gpu_time_is_within_the_hosts(engine: Path) -> None:
    with WorkerProcess("engine", engine, threads=None) as worker:
        prompt = np.arange(5, 21)[None]
        worker.measure(prompt, new_tokens=8)
        sample = worker.measure(prompt, new_tokens=8)
        assert worker.peak_device_bytes
    assert sample.device_ms is not None
    assert len(sample.device_ms) == 8
    assert all(on_device > 0 for on_device in sample.device_ms)
    assert sample.device_ms[0] <= sample.prefill_ms
    assert sum(sample.device_ms[1:]) <= sum(sample.itl_ms)


def test_an_engine_for_other_gpus_is_refused(folder: Path, target: str) -> None:
    needs("tensorrt_rtx")
    other = "sm86" if target != "sm86" else "sm89"
    with pytest.raises(NirvanaError, match=rf"was built for {other}; this machine's .* is {target}"):
        TensorRTRunner(build(folder, "tensorrt-rtx", (other,)))


def test_the_engines_of_an_encoder_decoder_compute_what_onnxruntime_does(
    runtime: str, target: str, tmp_path: Path
) -> None:
    folder = tmp_path / "onnx"
    onnx_from_checkpoint(Checkpoint.open(write_t5(tmp_path / "model", "flan-t5")), folder, dtype="fp16")
    options = BuilderOptions(runtime, targets=(target,) if runtime == "tensorrt-rtx" else None)
    _, decoder = engines_from_onnx_folder(folder, tmp_path / "engine", lengths=LENGTHS, options=options)
    reference = OrtSeq2Seq(folder, in_float32=True)
    with TensorRTSeq2Seq(decoder) as runner:
        report = compare_runners(
            reference,
            runner,
            cases=engine_cases(read_engine_record(decoder), vocab_size=runner.vocab_size),
            tolerance=device_tolerance("fp16", layers=7),  # 3 in the encoder, 2 and 2 in the decoder
            prompts=random_prompts(runner.vocab_size),
        )
    assert report.passed, report


@pytest.mark.parametrize(
    "name", [row.name for row in RUNTIMES.values() if row.provider and row.device == "gpu"]
)
def test_a_provider_computes_what_the_cpu_does(folder: Path, form: str, name: str) -> None:
    if not available(RUNTIMES[name].provider or ""):
        pytest.skip(f"this onnxruntime has no {RUNTIMES[name].provider}")
    if form == "in-place" and name != "onnxruntime-cuda":
        pytest.skip("the TensorRT providers have no in-place cache update")
    reference = OrtDecoder(folder, in_float32=True)
    with open_runner(folder, runtime=name) as runner:
        report = compare_runners(
            reference,
            runner,
            tolerance=device_tolerance("fp16", layers=len(reference.kv_heads)),
            prompts=random_prompts(runner.vocab_size),
        )
    assert report.passed, report
