"""The whole job on an encoder-decoder, from a local T5 folder to a verified and measured one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.fake_tensorrt import pretend_gpu, write_fake_engine
from builders.jobs import write_short_recipe
from builders.plans import shape_of
from builders.tiny_t5 import write_t5
from click.testing import CliRunner

from nirvana_deploy import NirvanaError, VerificationError, prune_export
from nirvana_deploy.cli.main import commands
from nirvana_deploy.engine.drop_branch import drop_cache_branch
from nirvana_deploy.engine.profile import profiles_for, shapes_of
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.engine.source import read_source
from nirvana_deploy.measure import stage as measuring
from nirvana_deploy.measure.benchmark import weights_bytes
from nirvana_deploy.output.layout import DATA_FILE, DECODER_FILE, ENCODER_FILE
from nirvana_deploy.output.run import Run
from nirvana_deploy.runtime.models import models_for
from nirvana_deploy.runtime.recipe import Place
from nirvana_deploy.runtime.tensorrt.record import encoder_beside
from nirvana_deploy.verify.folder import verify_folder

pytestmark = pytest.mark.integration
QUANTIZED = ["--quantize", "int8", "--quantize", "w4", "--no-baseline-quantized"]
SMALL: dict[str, Any] = {"sparsity": 0.3, "round_to": 4, "num_sequences": 4, "seq_len": 16, "threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("model") / "tiny-flan-t5", "flan-t5")


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes; read-only."""
    out = tmp_path_factory.mktemp("out") / "done"
    recipe = write_short_recipe(model, out.with_suffix(".toml"), **SMALL)
    result = CliRunner().invoke(
        commands, ["prune-export", "--recipe", str(recipe), *QUANTIZED, "--out", str(out)]
    )
    assert result.exit_code == 0, (result.output, result.exception)
    return out


def record(out: Path, name: str) -> Any:
    return json.loads((out / name).read_text(encoding="utf-8"))


def test_both_models_are_exported_and_proved(finished: Path) -> None:
    for folder in ("onnx", "dense/onnx"):
        names = {path.name for path in (finished / folder).iterdir()}
        assert {ENCODER_FILE, DECODER_FILE, DATA_FILE, "config.json", "tokenizer.json"} <= names
        assert "genai_config.json" not in names
    verified = record(finished, "manifest.json")["stages"]["verify"]["result"]
    assert {name: report["passed"] for name, report in verified.items()} == {"pruned": True, "dense": True}
    assert {layer.site for layer in shape_of(finished / "checkpoint").layers} == {
        "encoder",
        "decoder",
        "cross",
    }


def test_it_is_measured_against_dense(model: Path, finished: Path) -> None:
    benchmark = record(finished, "benchmark.json")
    dense, pruned, *quantized = benchmark["variants"]
    names = [variant["name"] for variant in benchmark["variants"]]
    assert names == ["dense", "pruned", "pruned-int8", "pruned-w4"]
    assert dense["linear_parameters"] == shape_of(model).linear_parameters
    assert pruned["linear_parameters"] == shape_of(finished / "checkpoint").linear_parameters
    for variant in (dense, pruned, *quantized):
        assert variant["ttft_ms"]["p50"] >= variant["prefill_ms"]["p50"] > 0
        assert variant["tpot_ms"]["p50"] > 0
        assert variant["quality"]["tokens"] == 3 * 12  # the second halves of the windows
    assert pruned["quality"]["kl_vs_dense"] > 0
    comparison = benchmark["comparisons"][0]
    assert comparison["variant"] == "pruned"
    step = [variant["decode_bytes_per_step"] for variant in (dense, pruned)]
    assert comparison["bound_tpot_speedup"] == pytest.approx(step[0] / step[1])
    assert comparison["bound_tpot_speedup"] > 1 and comparison["bound_prefill_speedup"] > 1


def test_both_graphs_are_quantized(finished: Path) -> None:
    manifest = record(finished, "manifest.json")
    for scheme in ("int8", "w4"):
        found = record(finished, f"onnx-{scheme}/quantization.json")
        stage = manifest["stages"][f"onnx-{scheme}"]["result"]
        assert stage["passed"] and stage["coverage"] == found["coverage"]
        assert found["coverage"]["found"] == found["coverage"]["promised"] > 20
        linears = found["linears"] if scheme == "w4" else found["int8"]["linears"]
        assert {name.split(".")[0] for name in linears} == {"encoder", "decoder"}
    assert record(finished, "onnx-w4/quantization.json")["weights"]["rounding"] == "gptq"
    quality = record(finished, "quality.json")["variants"]
    pruned = quality["pruned"]["kl_vs_dense"]
    assert quality["pruned-int8"]["kl_vs_dense"] < 1.1 * pruned  # what int8 promises: a tenth more at most


def test_the_report_speaks_of_an_encoder_decoder(finished: Path) -> None:
    text = (finished / "report.md").read_text(encoding="utf-8")
    assert "| cross 1 |" in text and "AutoModelForSeq2SeqLM" in text and "OrtSeq2Seq" in text
    assert "onnxruntime_genai" not in text
    assert "the encoder reads the first half of a window" in text
    assert "not run: onnxruntime-genai 0.18 runs no T5" in text


def test_the_folder_is_used_by_the_other_commands(finished: Path) -> None:
    inspected = CliRunner().invoke(commands, ["inspect", str(finished), "--json"])
    assert inspected.exit_code == 0 and '"cross"' in inspected.output
    answered = CliRunner().invoke(
        commands, ["generate", str(finished), "--prompt", "Hello", "--max-new-tokens", "3", "--json"]
    )
    assert answered.exit_code == 0, answered.output
    assert json.loads(answered.stdout)["prompt_tokens"] == 5


def test_what_it_cannot_be_packaged_for_is_said(finished: Path) -> None:
    for target, message in (("--triton", "onnxruntime-genai, which has no T5"), ("--gguf", "as GGUF")):
        result = CliRunner().invoke(commands, ["package", str(finished), target])
        assert isinstance(result.exception, NirvanaError) and message in result.exception.message


def test_verify_finds_a_damaged_weight(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    with (out / "onnx" / DATA_FILE).open("r+b") as data:
        data.seek(-64, 2)
        data.write(bytes(range(64)))
    with pytest.raises(VerificationError, match=r"onnx/model\.onnx\.data"):
        verify_folder(out, threads=1).require_passed()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flavor": "gqa"}, "cannot be exported with the flavor gqa"),
        ({"quantize": ("int9",)}, r"quantize = \('int9',\) is not allowed; .* Did you mean 'int8'"),
    ],
)
def test_what_cannot_be_had_is_refused_before_any_work(
    model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(NirvanaError, match=message):
        prune_export(str(model), sparsity=0.3, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def with_engines(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder with both engines of dense and pruned, and a GPU, all of them fakes."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "engine").mkdir()
    for name, folder in (("pruned", "onnx"), ("dense", "dense/onnx")):
        onnx = out / "engine" / f"{name}-onnx"
        shutil.copytree(out / folder, onnx)
        drop_cache_branch(onnx / DECODER_FILE)
        for part, file in (("encoder", ENCODER_FILE), ("decoder", DECODER_FILE)):
            source = read_source(onnx / file)
            profiles = [shapes_of(source, one) for one in profiles_for(source, Lengths(max_length=48))]
            engine = out / "engine" / f"{name}-{part}.engine"
            write_fake_engine(engine, onnx, profiles=profiles, file=file, part=part)
    pretend_gpu(monkeypatch, tmp_path / "cache")
    return out


def test_engines_are_verified_judged_and_run_like_the_onnx(with_engines: Path) -> None:
    """Two engines are one model, called by its decoder."""
    out = with_engines
    found = {variant.name: path for variant, path in models_for(Run.open(out), "tensorrt-rtx").items()}
    decoders = {name: out / "engine" / f"{name}-decoder.engine" for name in ("dense", "pruned")}
    assert found == decoders
    checked = verify_folder(out, threads=1, runtime="tensorrt-rtx")
    assert set(checked.compared) == {"engine/dense-decoder.engine", "engine/pruned-decoder.engine"}
    checked.require_passed()
    run, on_cpu = Run.open(out), record(out, "quality.json")["variants"]
    stage = measuring.quality(run, Place(runtime="tensorrt-rtx", threads=1))
    judged = run.run(stage, redo=True)["variants"]
    for name in ("dense", "pruned"):
        assert judged[name]["perplexity"] == pytest.approx(on_cpu[name]["perplexity"], rel=1e-5)
    options = ["--prompt", "Hello", "--max-new-tokens", "6", "--json"]
    answers = [
        json.loads(CliRunner().invoke(commands, ["generate", str(path), *options]).stdout)
        for path in (decoders["pruned"], out)
    ]
    assert [answer["runtime"] for answer in answers] == ["tensorrt-rtx", "onnxruntime-cpu"]
    assert answers[0]["text"] == answers[1]["text"]
    assert weights_bytes(found["pruned"]) == sum(
        path.stat().st_size for path in (found["pruned"], encoder_beside(found["pruned"]))
    )
