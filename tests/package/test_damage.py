"""A package holds the bytes that the manifest vouches for, or is not made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage
from nirvana_deploy.package.stage import package_gguf, package_triton


@pytest.fixture
def out(tiny_llama: Path, tmp_path: Path) -> Path:
    """An output folder with a checkpoint and an ONNX model, both in its manifest."""
    out = tmp_path / "out"

    def copy() -> None:
        shutil.copytree(tiny_llama, out / "checkpoint")

    def export() -> None:
        onnx_from_checkpoint(Checkpoint.open(out / "checkpoint"), out / "onnx")

    with Run.begin(out, options={}, model={"name": "m"}, command="c") as run:
        for name, work in (("checkpoint", copy), ("onnx", export)):
            run.run(Stage(name, (), (name,), work))
    return out


def flip_last_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("source", ["out", "part", "elsewhere"])
def test_a_flipped_bit_is_not_packaged_for_triton(out: Path, tmp_path: Path, source: str) -> None:
    flip_last_bit(out / "onnx/model.onnx.data")
    target = tmp_path / "repository"
    with pytest.raises(NirvanaError, match=r"onnx/model\.onnx\.data is not the file that") as refused:
        if source == "out":
            package_triton(out)
        else:
            package_triton(out / "onnx" if source == "part" else out, target)
    assert "nirvana-deploy verify" in (refused.value.hint or "")
    assert not target.exists() and not (out / "triton").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_flipped_bit_is_not_packaged_as_gguf(out: Path, file: str) -> None:
    flip_last_bit(out / "checkpoint" / file)
    with pytest.raises(NirvanaError, match=f"checkpoint/{file} is not the file that"):
        package_gguf(out)


def test_a_lost_file_is_named(out: Path) -> None:
    (out / "onnx/generation_config.json").unlink()
    with pytest.raises(NirvanaError, match=r"onnx/generation_config\.json is not the file"):
        package_triton(out)


def test_damage_elsewhere_and_folders_without_a_manifest_do_not_matter(out: Path, tmp_path: Path) -> None:
    flip_last_bit(out / "checkpoint/model.safetensors")
    assert package_triton(out).path == out / "triton"
    alone = shutil.copytree(out / "onnx", tmp_path / "alone")
    flip_last_bit(alone / "model.onnx.data")
    assert package_triton(alone, tmp_path / "repository").models == ("alone", "alone-graph")
