"""What stands between the builder and its user: log, progress, options, the refusals before a build."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.engine.source import read_source, require_parsable
from nirvana_deploy.engine.targets import DEFAULT_RTX_TARGETS, BuilderOptions, configure
from nirvana_deploy.engine.trtexec import trtexec_command
from nirvana_deploy.engine.vendor import (
    PROGRESS_STEPS,
    BuilderLog,
    PhaseTree,
    make_monitor,
    make_writer,
    require_builder,
)
from nirvana_deploy.runtime.tensorrt.loading import tensorrt_module
from nirvana_deploy.runtime.tensorrt.record import ProfileRecord

FAKE = SimpleNamespace(
    IProgressMonitor=type("IProgressMonitor", (), {"__init__": lambda self: None}),
    IStreamWriter=type("IStreamWriter", (), {"__init__": lambda self: None}),
)


def test_warnings_are_told_once_and_explained() -> None:
    log = BuilderLog(
        [
            ("WARNING", "ModelImporter.cpp:1071: Make sure input input_ids has Int64 binding."),
            ("WARNING", "ModelImporter.cpp:1071: Make sure input position_ids has Int64 binding."),
            ("WARNING", "Something of which nothing is known."),
            ("VERBOSE", "chatter"),
            ("INFO", "Detected 3 inputs"),
        ]
    )
    first, second = log.warnings()
    assert "bind buffers of 8 bytes" in first and "input_ids" not in first
    assert second == "Something of which nothing is known."
    assert "chatter" not in log.text() and "[INFO] Detected 3 inputs\n" in log.text()


def test_the_reason_is_the_first_error_in_one_line() -> None:
    log = BuilderLog(
        [("INFO", "x"), ("ERROR", "--- Begin node ---"), ("ERROR", "no\n kernel."), ("ERROR", "y")]
    )
    assert log.reason() == "no kernel"
    assert BuilderLog().reason() == "it gave no reason"


def test_progress_follows_nested_phases() -> None:
    phases = PhaseTree()
    phases.start("build", None, 4)
    phases.step("build")
    phases.start("optimize", "build", 2)
    assert phases.share() == 0.25
    phases.step("optimize")
    assert phases.share() == 0.375
    phases.finish("optimize")
    phases.step("build")
    assert phases.share() == 0.5


def test_the_monitor_advances_and_never_goes_back() -> None:
    advanced: list[int] = []
    monitor = make_monitor(FAKE, advanced.append, [])
    monitor.phase_start("build", None, 2)
    monitor.phase_start("inner", "build", 1)
    assert monitor.step_complete("inner", 0)
    monitor.phase_finish("inner")
    assert monitor.step_complete("build", 0) and monitor.step_complete("build", 1)
    assert sum(advanced) == PROGRESS_STEPS and all(steps > 0 for steps in advanced)


def test_an_interrupt_ends_the_build_without_crossing_it() -> None:
    kept: list[BaseException] = []

    def interrupt(steps: int) -> None:
        raise KeyboardInterrupt

    monitor = make_monitor(FAKE, interrupt, kept)
    monitor.phase_start("build", None, 1)
    assert monitor.step_complete("build", 0) is False
    assert isinstance(kept[0], KeyboardInterrupt)


def test_an_error_of_the_stream_ends_the_build_at_its_next_step() -> None:
    errors: list[BaseException] = []
    monitor = make_monitor(FAKE, lambda steps: None, errors)
    monitor.phase_start("build", None, 2)
    assert monitor.step_complete("build", 0) is True
    errors.append(OSError(28, "No space left on device"))
    assert monitor.step_complete("build", 1) is False


def test_a_full_disk_ends_the_stream() -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    kept: list[BaseException] = []
    assert make_writer(FAKE, Full(), kept).write(b"engine") == 0
    assert isinstance(kept[0], OSError) and kept[0].errno == 28


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        MissingExtraError, match=r"(?s)'tensorrt', which is not installed.*pip install .*\[gpu\]"
    ):
        tensorrt_module("tensorrt")
    with pytest.raises(NirvanaError, match=r"Unknown engine 'openvino'\. Known: tensorrt, tensorrt-rtx"):
        tensorrt_module("openvino")


@pytest.mark.parametrize("version", ["10.12.0.36", "10.14.1.48.post1"])
def test_a_tensorrt_without_the_layers_is_refused(version: str) -> None:
    with pytest.raises(
        NirvanaError, match=r"(?s)has no layers for Attention.*pip install 'tensorrt>=10\.15'"
    ):
        require_builder("tensorrt", version)
    for runtime, enough in (
        ("tensorrt", "10.15.1.29"),
        ("tensorrt", "11.4.0.106"),
        ("tensorrt-rtx", version),
    ):
        require_builder(runtime, enough)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"runtime": "tensorrt-rtx", "targets": ("sm70",)},
            "Unknown target sm70; RTX engines can be built for",
        ),
        ({"runtime": "tensorrt-rtx", "targets": ()}, "Unknown target"),
        ({"runtime": "tensorrt-rtx", "version_compatible": True}, "no use for version compatibility"),
        ({"runtime": "tensorrt-rtx", "hardware_compatible": True}, "no use for hardware compatibility"),
        ({"runtime": "tensorrt-rtx", "timing_cache": Path("x")}, "no use for a timing cache"),
        ({"runtime": "tensorrt", "targets": ("sm80",)}, "builds for the GPU of this machine"),
        ({"runtime": "tensorrt-rtx", "workspace_bytes": 0}, "at least 1 byte"),
    ],
)
def test_options_that_a_runtime_does_not_have_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NirvanaError, match=message):
        BuilderOptions(**options)


class FakeConfig:
    """An IBuilderConfig of tensorrt that remembers what it was told."""

    def __init__(self) -> None:
        self.flags: list[str] = []
        self.limits: dict[str, int] = {}
        self.cache: bytes | None = None
        self.hardware_compatibility_level = "none"

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def set_memory_pool_limit(self, pool: str, limit_bytes: int) -> None:
        self.limits[pool] = limit_bytes

    def create_timing_cache(self, known: bytes) -> bytes | None:
        return None if known == b"damaged" else known

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return cache != b"another GPU's"


def test_options_of_tensorrt_reach_its_config(tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"known")
    trt = SimpleNamespace(
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        BuilderFlag=SimpleNamespace(WEIGHT_STREAMING="stream", STRIP_PLAN="strip", VERSION_COMPATIBLE="vc"),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere+"),
    )
    options = BuilderOptions(
        runtime="tensorrt",
        workspace_bytes=1 << 30,
        weight_streaming=True,
        strip_weights=True,
        hardware_compatible=True,
        version_compatible=True,
        timing_cache=cache,
    )
    config = configure(trt, SimpleNamespace(create_builder_config=FakeConfig), options)
    assert config.flags == ["stream", "strip", "vc"] and config.limits == {"workspace": 1 << 30}
    assert (config.hardware_compatibility_level, config.cache) == ("ampere+", b"known")
    for content in (b"damaged", b"another GPU's"):
        cache.write_bytes(content)
        with pytest.raises(NirvanaError, match=r"(?s)is no timing cache of this TensorRT.*delete it"):
            configure(trt, SimpleNamespace(create_builder_config=FakeConfig), options)


PROFILES = (
    ProfileRecord("prefill", {"input_ids": ((1, 1), (1, 8), (4, 64)), "w": ((1,), (1,), (4,))}),
    ProfileRecord("decode", {"input_ids": ((1, 1), (1, 1), (4, 1)), "w": ((1,), (1,), (4,))}),
)


def test_the_vendors_command_says_the_same() -> None:
    rtx = trtexec_command(
        Path("a b/model.onnx"),
        "m.engine",
        BuilderOptions("tensorrt-rtx", targets=("sm86", "sm120")),
        profiles=PROFILES,
    )
    assert rtx == (
        "tensorrt_rtx '--onnx=a b/model.onnx' --saveEngine=m.engine --skipInference "
        "--computeCapabilities=86,120 "
        "--profile=0 --minShapes=input_ids:1x1,w:1 --optShapes=input_ids:1x8,w:1 "
        "--maxShapes=input_ids:4x64,w:4 "
        "--profile=1 --minShapes=input_ids:1x1,w:1 --optShapes=input_ids:1x1,w:1 "
        "--maxShapes=input_ids:4x1,w:4"
    )
    full = trtexec_command(
        Path("m.onnx"),
        "m.engine",
        BuilderOptions(
            "tensorrt",
            workspace_bytes=1 << 30,
            weight_streaming=True,
            strip_weights=True,
            hardware_compatible=True,
            version_compatible=True,
        ),
        profiles=(),
    )
    assert full.startswith("trtexec --onnx=m.onnx --saveEngine=m.engine --skipInference --stronglyTyped")
    assert full.endswith(
        "--memPoolSize=workspace:1024M --allowWeightStreaming --stripWeights "
        "--hardwareCompatibilityLevel=ampere+ --versionCompatible"
    )


def test_all_targets_from_ampere_on_by_default() -> None:
    assert BuilderOptions("tensorrt-rtx").resolved_targets() == DEFAULT_RTX_TARGETS
    assert "sm75" not in DEFAULT_RTX_TARGETS


def model_of(folder: Path, nodes: list[onnx.NodeProto], dtype: int = TensorProto.FLOAT) -> Path:
    """An ONNX file of these nodes from x to y."""
    x, y = (helper.make_tensor_value_info(name, dtype, ["N", 4]) for name in "xy")
    path = folder / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y])), path)
    return path


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            helper.make_node("GroupQueryAttention", ["x"], ["y"], domain="com.microsoft"),
            r"(?s)com\.microsoft\.GroupQueryAttention.*--flavor portable, or --flavor static-cache",
        ),
        (
            helper.make_node("MatMulNBits", ["x"], ["y"], domain="com.microsoft"),
            r"(?s)com\.microsoft\.MatMulNBits.*--quantize w8 or w4",
        ),
        (
            helper.make_node("Magic", ["x"], ["y"], domain="my.own"),
            r"(?s)my\.own\.Magic.*from the checkpoint",
        ),
        (helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"]), "DynamicQuantizeLinear"),
        (helper.make_node("MatMulInteger", ["x", "x"], ["y"]), r"(?s)MatMulInteger.*explicit Q/DQ"),
        (helper.make_node("Attention", ["x", "x", "x"], ["y", "k", "v"]), "3 outputs"),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)
def test_what_the_parser_would_refuse_is_named(tmp_path: Path, node: onnx.NodeProto, message: str) -> None:
    with pytest.raises(NirvanaError, match=message):
        require_parsable(read_source(model_of(tmp_path, [node])))


def test_what_is_no_onnx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"(?s)holds no model\.onnx.*nirvana-deploy export"):
        read_source(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(NirvanaError, match="is not an ONNX file"):
        read_source(tmp_path / "model.onnx")
    path = model_of(tmp_path, [helper.make_node("Identity", ["x"], ["y"])], TensorProto.STRING)
    with pytest.raises(NirvanaError, match="has type STRING"):
        read_source(path)
