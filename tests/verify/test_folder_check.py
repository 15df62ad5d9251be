"""Folders that were moved, damaged or mixed up: each says what happened and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from builders.plans import plan_for
from builders.tiny import write_tiny
from click.testing import CliRunner

from nirvana_deploy import NirvanaError
from nirvana_deploy.base.errors import VerificationError
from nirvana_deploy.cli.verify import verify
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_tokenizer
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.package.triton import triton_from_onnx
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import check_plan_was_cut
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.quantize.schemes import SCHEMES
from nirvana_deploy.runtime.genai import GenaiModel
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.text import load_text_side
from nirvana_deploy.verify import folder as verifying
from nirvana_deploy.verify.folder_check import check_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the genai bindings while they load


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, ONNX folder); read-only."""
    folder = tmp_path_factory.mktemp("exported")
    onnx_from_checkpoint(Checkpoint.open(write_tiny(folder / "checkpoint", "qwen3")), folder / "onnx")
    return folder / "checkpoint", folder / "onnx"


@pytest.fixture
def folder(exported: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the ONNX folder, to be damaged."""
    return Path(shutil.copytree(exported[1], tmp_path / "onnx"))


def rewritten(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def moved_to(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    return change


def test_a_whole_folder_passes(exported: tuple[Path, Path], folder: Path) -> None:
    check_folder(folder, exported[0])


def test_weights_left_behind(exported: tuple[Path, Path], folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    with pytest.raises(NirvanaError, match=r"model\.onnx\.data, which is missing beside it.\nMove both"):
        check_folder(folder, exported[0])


@pytest.mark.parametrize(
    "location", ["../model.onnx.data", "/tmp/model.onnx.data", "a/../../model.onnx.data"]
)
def test_weights_outside_of_the_folder(exported: tuple[Path, Path], folder: Path, location: str) -> None:
    shutil.copy(folder / "model.onnx.data", folder.parent)
    rewritten(folder, moved_to(location))
    with pytest.raises(NirvanaError, match=r"outside of the model's folder; such a file is refused"):
        check_folder(folder, exported[0])


def test_a_link_out_of_the_folder(exported: tuple[Path, Path], folder: Path) -> None:
    outside = folder.parent / "elsewhere.data"
    (folder / "model.onnx.data").rename(outside)
    (folder / "model.onnx.data").symlink_to(outside)
    with pytest.raises(NirvanaError, match="outside of the model's folder"):
        check_folder(folder, exported[0])


def test_weights_cut_short(exported: tuple[Path, Path], folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-5])
    with pytest.raises(NirvanaError, match=r"ends at byte \d+: it is cut short"):
        check_folder(folder, exported[0])


def test_a_graph_cut_short(exported: tuple[Path, Path], folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(NirvanaError, match=r"model\.onnx is not"):
        check_folder(folder, exported[0])


def newer(model: onnx.ModelProto) -> None:
    next(e for e in model.metadata_props if e.key == "nirvana_deploy.schema").value = "2"


def test_a_graph_of_a_newer_version(exported: tuple[Path, Path], folder: Path) -> None:
    rewritten(folder, newer)
    with pytest.raises(NirvanaError, match=r"schema 2; this version reads schema 1.\ngit .*pull"):
        check_folder(folder, exported[0])


def test_a_newer_graph_is_not_run_or_quantized(folder: Path, tmp_path: Path) -> None:
    rewritten(folder, newer)
    for use in (
        lambda: OrtDecoder(folder, threads=1),
        lambda: quantize_onnx(folder, tmp_path / "w8", Quantization(scheme="w8")),
        lambda: triton_from_onnx(folder, tmp_path / "triton", name="newer"),
    ):
        with pytest.raises(NirvanaError, match="was written with schema 2; this version reads schema 1"):
            use()
    assert not (tmp_path / "w8").exists() and not (tmp_path / "triton").exists()


def test_damaged_folders_are_not_packaged(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.onnx.data", folder.parent)
    rewritten(folder, moved_to("../model.onnx.data"))
    with pytest.raises(NirvanaError, match=r"outside of the model's folder; such a file is refused"):
        triton_from_onnx(folder, tmp_path / "triton", name="outside")
    rewritten(folder, moved_to("model.onnx.data"))
    (folder / "model.onnx.data").unlink()
    with pytest.raises(NirvanaError, match=r"missing beside it.\nMove both"):
        triton_from_onnx(folder, tmp_path / "triton", name="left-behind")
    assert not (tmp_path / "triton").exists()


def test_an_invalid_graph(exported: tuple[Path, Path], folder: Path) -> None:
    rewritten(folder, lambda model: model.graph.node[0].ClearField("op_type"))
    with pytest.raises(NirvanaError, match="is not a valid ONNX model"):
        check_folder(folder, exported[0])


def test_a_graph_of_another_cut(exported: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    plan = plan_for(exported[0])
    slice_checkpoint(Checkpoint.open(exported[0]), plan, tmp_path / "pruned")
    with pytest.raises(NirvanaError, match=r"holds 3 KV heads of 16 numbers, its checkpoint [12] of 16"):
        check_folder(folder, tmp_path / "pruned")
    check_plan_was_cut(plan, shape_from_config(config_json(tmp_path / "pruned")))
    with pytest.raises(NirvanaError, match=r"Layer \d has 3 KV heads .* the plan keeps .*\nRedo the cut"):
        check_plan_was_cut(plan, shape_from_config(config_json(exported[0])))


def test_a_lost_tokenizer(exported: tuple[Path, Path], folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(NirvanaError, match=r"has no tokenizer\.json, and its checkpoint has one.*\nCopy it"):
        check_folder(folder, exported[0])
    for load in (load_tokenizer, load_text_side):
        with pytest.raises(NirvanaError, match=r"cannot be loaded: tokenizer\.json is missing\.\nCopy"):
            load(folder)


def test_a_genai_config_with_a_key_of_ones_own(folder: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["nirvana"] = {"sparsity": 0.4}
    (folder / "genai_config.json").write_text(json.dumps(config))
    message = r"nirvana.*\nIt takes no key that it does not know.*--force"
    with pytest.raises(NirvanaError, match=message):
        GenaiModel(folder)


@pytest.mark.parametrize("content", ["[]", "[" * 100_000 + "]" * 100_000])
def test_tokenizer_settings_that_onnxruntime_genai_does_not_read(folder: Path, content: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    message = r"cannot read the tokenizer in .*\n.*--force"
    model = GenaiModel(folder)
    with pytest.raises(NirvanaError, match=message):
        model.encoder()


def test_an_onnx_folder_alone_is_verified(exported: tuple[Path, Path], folder: Path) -> None:
    with pytest.raises(NirvanaError, match=r"an ONNX folder alone.*\nnirvana-deploy verify .* --checkpoint"):
        verifying.verify_folder(folder)
    result = CliRunner().invoke(
        verify, [str(folder), "--checkpoint", str(exported[0]), "--threads", "1"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert "ONNX checker, external" in result.output and "whole" in result.output
    both = CliRunner().invoke(verify, [str(folder), "--checkpoint", "x", "--runtime", "onnxruntime-cpu"])
    assert both.exit_code == 2 and "--runtime goes with an output folder" in both.output
    assert "FAILED" not in result.output and "sha256" not in result.output


def test_a_quantized_folder_is_verified(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, folder = exported
    quantized = quantize_onnx(folder, tmp_path / "w8", Quantization(scheme="w8")).path
    order = [str(quantized), "--checkpoint", str(checkpoint)]
    result = CliRunner().invoke(verify, order, catch_exceptions=False)
    assert result.exit_code == 0 and "linears in integer kernels" in result.output, result.output
    told = json.loads(CliRunner().invoke(verify, [*order, "--json"]).stdout)["quantized"]["model"]
    assert told["promised"] == told["found"] == 21

    monkeypatch.setitem(SCHEMES, "w8", replace(SCHEMES["w8"], integer_kernels=frozenset()))
    worse = CliRunner().invoke(verify, order)
    assert "FAILED" in worse.output and isinstance(worse.exception, VerificationError)
    assert "0/21 linears run in integer kernels" in worse.exception.message
    (quantized / "model.onnx.data").unlink()
    with pytest.raises(NirvanaError, match="missing beside it"):
        verifying.verify_onnx_folder(quantized, model=str(checkpoint))


def test_what_is_not_an_output_folder_says_what_it_is(exported: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"is a checkpoint alone.*\n.*verify ONNX_FOLDER --checkpoint"):
        verifying.verify_folder(exported[0])
    part = shutil.copytree(exported[1], tmp_path / "out" / "dense" / "onnx")
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(NirvanaError, match=r"a part of the output folder .*out, .*\nnirvana-deploy verify"):
        verifying.verify_folder(part)
    with pytest.raises(NirvanaError, match=r"no manifest\.json"):
        verifying.verify_folder(tmp_path)
