"""Loading engines with the real tensorrt-rtx, as far as that goes without a GPU."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders.extras import needs
from builders.fake_cuda import FakeDriver
from builders.fake_tensorrt import (
    FakeContext,
    FakeEngine,
    FakeRuntime,
    FakeRuntimeCache,
    FakeRuntimeConfig,
    decoder_profiles,
    fake_module,
    write_fake_engine,
)
from builders.gpu import without_gpu
from builders.tiny import write_tiny
from builders.tiny_decoder import write_tiny_decoder
from onnx import TensorProto, helper, numpy_helper

from nirvana_deploy.base.artifact import sha256_of, write_json
from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.engine.build import engine_from_onnx
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.targets import BuilderOptions, configure
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.runner import greedy_tokens
from nirvana_deploy.runtime.tensorrt.decoder import TensorRTRunner, open_engine
from nirvana_deploy.runtime.tensorrt.loading import load_engine, tensorrt_module
from nirvana_deploy.runtime.tensorrt.record import read_engine_record, record_path

trt: Any = needs("tensorrt_rtx")


@pytest.fixture(scope="module")
def engine_bytes() -> bytes:
    """A real engine of one MatMul."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["N", 8]) for name in "xy")
    weight = numpy_helper.from_array(np.ones((8, 8), np.float16), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(model.SerializeToString())
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("x", (1, 8), (1, 8), (4, 8))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


@pytest.fixture
def engine(engine_bytes: bytes, tmp_path: Path) -> Path:
    """A real engine with the record of a decoder: what is wrong with it shows after it was read."""
    folder = write_tiny_decoder(tmp_path / "onnx")
    profiles = decoder_profiles(folder, batch_size=1, step_tokens=4, total_tokens=16)
    path = write_fake_engine(tmp_path / "real.engine", folder, profiles=profiles, version=trt.__version__)
    return rewritten(path, engine_bytes)


def rewritten(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    record = {**read_json(record_path(path)), "engine_bytes": len(data), "engine_sha256": sha256_of(path)}
    write_json(record_path(path), record)
    return path


@without_gpu
def test_an_engine_without_a_gpu_is_one_sentence(engine: Path) -> None:
    needs("cuda.bindings.driver")
    with pytest.raises(NirvanaError) as caught:
        TensorRTRunner(engine)
    assert re.match(
        r"(No NVIDIA driver on this machine: |The NVIDIA driver of this machine )", str(caught.value)
    )
    assert str(caught.value.hint).startswith("Engines are built and inspected without a GPU")


@without_gpu
def test_what_tensorrt_says_when_it_does_not_read_a_real_engine(engine: Path) -> None:
    device = SimpleNamespace(name="no GPU at all")
    with pytest.raises(NirvanaError, match=r"does not read .* on no GPU at all: .*CUDA driver version"):
        load_engine(engine, read_engine_record(engine), module=trt, device=device)  # type: ignore[arg-type]


def test_what_tensorrt_says_of_bytes_that_are_no_engine(engine: Path) -> None:
    rewritten(engine, b"x" * 500)
    device = SimpleNamespace(name="any GPU")
    with pytest.raises(NirvanaError, match=r"does not read .*magicTag"):
        load_engine(engine, read_engine_record(engine), module=trt, device=device)  # type: ignore[arg-type]


def test_another_version_is_refused_before_a_gpu_is_looked_for(engine: Path) -> None:
    write_json(record_path(engine), {**read_json(record_path(engine)), "runtime_version": "1.2.0.54"})
    with pytest.raises(
        NirvanaError, match=rf"built by tensorrt-rtx 1\.2\.0\.54; {trt.__version__} is installed"
    ):
        TensorRTRunner(engine)


def test_an_engine_of_the_other_tensorrt_is_refused(engine: Path) -> None:
    with pytest.raises(
        NirvanaError, match=r"is an engine of tensorrt-rtx, and tensorrt is asked for\.\n.*--runtime"
    ):
        open_engine(engine, runtime="tensorrt")


@pytest.mark.parametrize(
    ("runtime", "module", "extra"), [("tensorrt", "tensorrt", "gpu"), ("tensorrt-rtx", "tensorrt_rtx", "rtx")]
)
def test_without_the_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, runtime: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"An engine of {runtime} needs .*\n.*\[{extra}\]"):
        tensorrt_module(runtime)


# the fake speaks the language of the real one


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (FakeRuntime, trt.Runtime),
        (FakeEngine, trt.ICudaEngine),
        (FakeContext, trt.IExecutionContext),
        (FakeRuntimeConfig, trt.IRuntimeConfig),
        (FakeRuntimeCache, trt.IRuntimeCache),
    ],
    ids=["Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache"],
)
def test_the_fake_has_no_method_that_the_real_one_has_not(fake: type, real: Any) -> None:
    compared = 0
    for name, method in inspect.getmembers(fake, inspect.isfunction):
        if name.startswith("_"):
            continue
        assert hasattr(real, name), name
        if name == "create_execution_context":  # overloaded: a strategy, or a config
            continue
        parameters = [p for p in inspect.signature(method).parameters if p != "self"]
        assert all(re.search(rf"\b{p}\b: ", getattr(real, name).__doc__) for p in parameters), name
        compared += 1
    assert compared


def test_what_the_runner_reads_of_the_real_module_is_there() -> None:
    for name in ("num_io_tensors", "num_optimization_profiles", "create_runtime_config"):
        assert hasattr(trt.ICudaEngine, name)
    assert hasattr(trt.IExecutionContext, "is_stream_capturable")
    assert trt.__name__ == "tensorrt_rtx"
    for enum, members in (
        (trt.ILogger.Severity, ("INTERNAL_ERROR", "ERROR")),
        (trt.ExecutionContextAllocationStrategy, ("USER_MANAGED",)),
        (trt.DynamicShapesKernelSpecializationStrategy, ("EAGER",)),
        (trt.TensorLocation, ("DEVICE",)),
    ):
        for member in members:
            assert hasattr(enum, member)
    for name in (
        "dynamic_shapes_kernel_specialization_strategy",
        "set_execution_context_allocation_strategy",
    ):
        assert hasattr(trt.IRuntimeConfig, name)
    for name in ("create_runtime_cache", "set_runtime_cache"):
        assert hasattr(trt.IRuntimeConfig, name)
    assert hasattr(trt.ICudaEngine, "weight_streaming_budget_v2")


# planning from the record of a real build


@pytest.mark.integration
@pytest.mark.parametrize("in_place", [False, True], ids=["concat", "in-place"])
def test_the_record_of_a_real_build_drives_the_runner(tmp_path: Path, in_place: bool) -> None:
    """Real names, dtypes, aliases and profiles (prefill of an empty past), and a fake that computes."""
    write_tiny(tmp_path / "checkpoint", "qwen3")
    cache_tokens = 48 if in_place else None
    flavor = "static-cache" if in_place else "portable"
    onnx_from_checkpoint(
        Checkpoint.open(tmp_path / "checkpoint"),
        tmp_path / "onnx",
        dtype="fp16",
        flavor=flavor,
        cache_tokens=cache_tokens,
    )
    lengths = Lengths(max_batch=2, max_length=48, opt_prompt=8, opt_length=24)
    built = engine_from_onnx(
        tmp_path / "onnx",
        tmp_path,
        lengths=lengths,
        options=BuilderOptions("tensorrt-rtx", targets=("sm89",)),
    )
    record = read_engine_record(built.path)
    write_fake_engine(built.path, tmp_path / "onnx", profiles=list(record.profiles))
    kept = {"engine_bytes": built.path.stat().st_size, "engine_sha256": sha256_of(built.path)}
    write_json(record_path(built.path), {**record.to_json(), **kept})
    driver, oracle = FakeDriver(), OrtDecoder(tmp_path / "onnx", threads=1)
    with TensorRTRunner(built.path, driver=driver, module=fake_module(driver)) as runner:
        assert (runner.kv_heads, runner.vocab_size) == (oracle.kv_heads, oracle.vocab_size)
        prompt = np.random.default_rng(2).integers(3, 250, size=(1, 9))
        assert greedy_tokens(runner, prompt, max_new_tokens=12) == greedy_tokens(
            oracle, prompt, max_new_tokens=12
        )
        assert driver.calls.count("cuStreamBeginCapture") == int(in_place)
        both = np.random.default_rng(3).integers(3, 250, size=(2, 48))
        np.testing.assert_array_equal(runner.prefill(both)[0], oracle.prefill(both)[0])


def test_rtx_engines_never_allocate_in_a_pass() -> None:
    """What lets a CUDA graph capture their decode pass."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    config = configure(trt, builder, BuilderOptions("tensorrt-rtx"))
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
