"""The JSON beside an engine: read back as written, and proof that the engine is the one it describes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nirvana_deploy.base.artifact import sha256_of, write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.runtime.tensorrt.record import (
    BuildCost,
    EngineRecord,
    LogDigest,
    ProfileRecord,
    TensorRecord,
    read_engine_record,
    record_path,
)


def a_record(engine: Path) -> EngineRecord:
    """A record of ``engine``'s present bytes."""
    shapes = {"input_ids": ((1, 1), (1, 64), (4, 128))}
    return EngineRecord(
        name=engine.stem,
        part="decoder",
        runtime="tensorrt-rtx",
        runtime_version="1.7.1.116",
        targets=("sm80", "sm89"),
        dtype="fp16",
        quantization=None,
        kv="in-place",
        inputs=(TensorRecord("input_ids", "int64", (None, None)),),
        outputs=(TensorRecord("present.0.key", "float16", (None, 3, 64, 64), alias="past_key_values.0.key"),),
        profiles=(ProfileRecord("prefill", shapes),),
        layers={"MATRIX_MULTIPLY": 3},
        weights_bytes=10,
        engine_file=engine.name,
        engine_bytes=engine.stat().st_size,
        engine_sha256=sha256_of(engine),
        onnx_sha256={"model.onnx": "00"},
        weight_streaming=False,
        stripped=False,
        workspace_bytes=None,
        build=BuildCost(seconds=1.0, cpu_seconds=0.9, peak_rss_bytes=100, parse_seconds=0.1),
        log=LogDigest(file="x.log", sha256="00", lines=3, warnings=("one",)),
        versions={"tensorrt_rtx": "1.7.1.116"},
        trtexec="tensorrt_rtx --onnx=model.onnx",
        notes=(),
    )


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"an engine of some bytes")
    write_json(record_path(path), a_record(path).to_json())
    return path


def test_a_record_reads_back_as_it_was_written(engine: Path) -> None:
    assert read_engine_record(engine) == a_record(engine)


def test_a_truncated_engine_is_refused(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(NirvanaError, match=r"truncated: 22 bytes, and model\.json says 23.*\nBuild it again"):
        read_engine_record(engine)


def test_an_engine_that_is_another_one_is_refused(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes()[::-1])
    with pytest.raises(NirvanaError, match="its sha256 differs"):
        read_engine_record(engine)
    assert read_engine_record(engine, check_bytes=False).name == "model"


def test_an_engine_without_its_record_was_never_finished(engine: Path) -> None:
    record_path(engine).unlink()
    with pytest.raises(NirvanaError, match=r"has no model\.json beside it"):
        read_engine_record(engine)


def test_a_missing_engine_is_named(engine: Path) -> None:
    engine.unlink()
    with pytest.raises(NirvanaError, match=r"model\.engine does not exist"):
        read_engine_record(engine)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EngineRecord)])
def test_a_record_without_a_field_is_refused(engine: Path, field: str) -> None:
    value = json.loads(record_path(engine).read_text())
    del value[field]
    write_json(record_path(engine), value)
    with pytest.raises(NirvanaError, match=rf"model\.json: it has no {field!r}"):
        read_engine_record(engine)


def test_a_record_of_another_schema_is_refused(engine: Path) -> None:
    write_json(record_path(engine), {"schema": 99})
    with pytest.raises(NirvanaError, match="schema 99"):
        read_engine_record(engine)
