"""Engines as a Triton model: the configuration by Triton's own schema, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders.fake_tensorrt import decoder_profiles, write_fake_engine
from builders.fake_triton import model_config_pb2, parsed
from builders.tiny_decoder import HEAD_DIM, KV_HEADS, VOCAB, write_tiny_decoder
from click.testing import CliRunner

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.cli.package import package
from nirvana_deploy.package.triton_engine import triton_from_engines
from nirvana_deploy.runtime.tensorrt.record import record_path


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return make_engine(tmp_path)


def make_engine(root: Path, name: str = "a", *, step_tokens: int = 8, **changes: Any) -> Path:
    folder = root / "onnx"
    if not folder.is_dir():
        write_tiny_decoder(folder)
    profiles = decoder_profiles(folder, batch_size=2, step_tokens=step_tokens, total_tokens=16)
    options = {"runtime": "tensorrt", "version": "10.13.3.9", "targets": ("native",), **changes}
    return write_fake_engine(root / f"{name}.engine", folder, profiles=profiles, **options)


def test_each_gpu_gets_its_plan(engine: Path, tmp_path: Path) -> None:
    other = make_engine(tmp_path, "b")
    out = triton_from_engines({"sm89": engine, "sm120": other}, tmp_path / "repository", name="tiny").path
    config = parsed(out, "tiny")
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "tensorrt", 0)
    assert dict(config.cc_model_filenames) == {"8.9": "model.sm89.plan", "12.0": "model.sm120.plan"}
    assert config.default_model_filename == "model.sm89.plan"
    group = config.instance_group[0]
    assert (group.kind, list(group.profile)) == (model_config_pb2.ModelInstanceGroup.KIND_GPU, ["0", "1"])
    for target, path in (("sm89", engine), ("sm120", other)):
        assert (out / "tiny" / "1" / f"model.{target}.plan").read_bytes() == path.read_bytes()
    dims = {tensor.name: list(tensor.dims) for tensor in (*config.input, *config.output)}
    assert dims["input_ids"] == [-1, -1]
    assert dims["logits"] == [-1, -1, VOCAB]
    for layer, heads in enumerate(KV_HEADS):
        assert dims[f"past_key_values.{layer}.key"] == [-1, heads, -1, HEAD_DIM]
    types = {tensor.name: tensor.data_type for tensor in config.input}
    assert types["input_ids"] == model_config_pb2.TYPE_INT64


def test_the_command_takes_targets_or_reads_them(engine: Path, tmp_path: Path) -> None:
    named = make_engine(tmp_path, "b", targets=("sm86",))
    arguments = ["--triton", "--engine", f"sm89={engine}", "--engine", str(named), "--name", "tiny", "--json"]
    out = tmp_path / "repository"
    result = CliRunner().invoke(
        package, [str(tmp_path), *arguments, "--out", str(out)], catch_exceptions=False
    )
    assert json.loads(result.stdout)["models"] == ["tiny"]
    assert sorted(p.name for p in (out / "tiny" / "1").iterdir()) == ["model.sm86.plan", "model.sm89.plan"]


def test_an_engine_for_two_gpus_is_the_plan_of_both(engine: Path, tmp_path: Path) -> None:
    out = triton_from_engines({"sm86": engine, "sm89": engine}, tmp_path / "repository", name="tiny").path
    plans = [out / "tiny" / "1" / f"model.{target}.plan" for target in ("sm86", "sm89")]
    assert {plan.read_bytes() for plan in plans} == {engine.read_bytes()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime": "tensorrt-rtx"}, "is an engine of tensorrt-rtx; Triton's TensorRT backend"),
        ({"stripped": True}, "holds no weights"),
    ],
)
def test_engines_that_triton_cannot_run(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NirvanaError, match=message):
        triton_from_engines({"sm89": make_engine(tmp_path, **changes)}, tmp_path / "out", name="tiny")
    assert not (tmp_path / "out").exists()


def test_an_in_place_cache_is_refused(engine: Path, tmp_path: Path) -> None:
    write_json(record_path(engine), {**read_json(record_path(engine)), "kv": "in-place"})
    with pytest.raises(NirvanaError, match=r"updates its KV cache in place.*\n.*--flavor portable"):
        triton_from_engines({"sm89": engine}, tmp_path / "out", name="tiny")


def test_plans_of_one_model_must_agree(engine: Path, tmp_path: Path) -> None:
    other = make_engine(tmp_path, "b", step_tokens=4)
    with pytest.raises(NirvanaError, match="The engine for sm86 has other inputs, outputs or profiles"):
        triton_from_engines({"sm89": engine, "sm86": other}, tmp_path / "out", name="tiny")


def test_a_target_must_be_named(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match="'native' is not a compute capability like sm89"):
        triton_from_engines({"native": engine}, tmp_path / "out", name="tiny")
    with pytest.raises(NirvanaError, match="needs at least one engine"):
        triton_from_engines({}, tmp_path / "out", name="tiny")
