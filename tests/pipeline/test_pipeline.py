"""The whole job on tiny models: resumed, interrupted, refused; and nothing that looks whole and is not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from builders.extras import needs
from builders.jobs import SHORT, SHORT_ROUNDS
from builders.tiny import INTERRUPTIBLE, write_tiny
from builders.unix import is_root
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from nirvana_deploy import NirvanaError, VerificationError, prune_export
from nirvana_deploy.base import artifact, resources
from nirvana_deploy.base.ownership import temporary
from nirvana_deploy.base.ownership.lock import LOCK
from nirvana_deploy.cli.main import commands
from nirvana_deploy.export import stage as export_stage
from nirvana_deploy.measure.recipe import Evaluation, Workload
from nirvana_deploy.output.promise import incomplete, unlisted
from nirvana_deploy.output.run import Run
from nirvana_deploy.pipeline.folder import benchmark_folder, evaluate_folder, quantize_folder, report_folder
from nirvana_deploy.pipeline.prune_export import prune_by_plan
from nirvana_deploy.quantize import folder as quantized_folder
from nirvana_deploy.quantize.coverage import Coverage
from nirvana_deploy.quantize.graph.linears import open_folder
from nirvana_deploy.quantize.recipe import Quantization
from nirvana_deploy.runtime.recipe import Place
from nirvana_deploy.verify import folder as verifying

OPTIONS: dict[str, Any] = {
    "sparsity": 0.3,
    "gamma": 1.0,
    "round_to": 4,
    "num_sequences": 4,
    "seq_len": 16,
    "threads": 1,
    **SHORT,
    **SHORT_ROUNDS,
}
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the genai bindings while they load
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("model") / "tinyllama-like", "llama-tied"))


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder of the whole job; tests that change it must copy it."""
    out = tmp_path_factory.mktemp("out") / "done"
    prune_export(model, out=out, **OPTIONS)
    return out


def stages_of(out: Path) -> dict[str, Any]:
    stages: dict[str, Any] = json.loads((out / "manifest.json").read_text())["stages"]
    return stages


def test_cards_and_what_their_readers_make_of_them_are_no_damage(finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "onnx" / "README.md").write_text("My own words.", encoding="utf-8")
    (out / "checkpoint" / "README.md").unlink()
    run = Run.open(out)
    assert not run.damaged() and not unlisted(run) and incomplete(run) is None
    report_folder(out)
    assert (out / "onnx" / "README.md").read_text(encoding="utf-8") == "My own words."
    assert (out / "checkpoint" / "README.md").is_file()


def test_the_output_folder_is_what_the_documentation_says(finished: Path) -> None:
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert {
        "manifest.json",
        "plan.json",
        "benchmark.json",
        "report.md",
        "report.html",
        "checkpoint/config.json",
        "checkpoint/model.safetensors",
        "checkpoint/modeling_nirvana.py",
        "checkpoint/README.md",
        "dense/onnx/README.md",
        "onnx/README.md",
        "onnx/model.onnx",
        "onnx/model.onnx.data",
        "onnx/genai_config.json",
        "onnx/tokenizer.json",
        "dense/onnx/model.onnx",
    } <= names
    assert not [name for name in names if temporary.PREFIX in name]
    recorded = stages_of(finished)
    assert list(recorded) == [
        "calibrate",
        "score",
        "plan",
        "checkpoint",
        "onnx",
        "dense-onnx",
        "verify",
        "quality",
        "answers",
        "benchmark",
        "report",
    ]
    for stage in recorded.values():
        assert stage["seconds"] >= 0 and stage["peak_rss_bytes"] > 0
        for file, sha256 in stage["files"].items():
            assert artifact.sha256_of(finished / file) == sha256
    benchmark = json.loads((finished / "benchmark.json").read_text())
    assert [variant["name"] for variant in benchmark["variants"]] == ["dense", "pruned"]
    assert (
        benchmark["variants"][1]["quality"]["kl_vs_dense"]
        > 0
        == benchmark["variants"][0]["quality"]["kl_vs_dense"]
    )
    assert benchmark["comparisons"][0]["bound_tpot_speedup"] > 1


def test_what_travels_names_no_folder_of_this_machine(finished: Path, model: str) -> None:
    """The manifest has the whole paths, and recipe.toml what was typed."""
    told = [path for path in finished.rglob("*") if path.is_file() and model.encode() in path.read_bytes()]
    assert {path.name for path in told} == {"manifest.json", "recipe.toml"}
    for page in ("report.md", "report.html"):
        assert str(finished.parent) not in (finished / page).read_text()


def test_a_quantized_variant_stands_beside_its_float_model(
    finished: Path, model: str, tmp_path: Path
) -> None:
    out = copied(finished, tmp_path)
    done = prune_export(model, out=out, resume=True, quantize=["int8"], **OPTIONS)
    assert done.benchmark is not None
    variants = {variant["name"]: variant for variant in done.benchmark["variants"]}
    assert list(variants) == ["dense", "pruned", "dense-int8", "pruned-int8"]
    quantized, pruned = variants["pruned-int8"], variants["pruned"]
    alone, dense = variants["dense-int8"], variants["dense"]
    assert alone["path"] == "dense/onnx-int8" and alone["linear_parameters"] == dense["linear_parameters"]
    step_bytes = [one["decode_bytes_per_step"] for one in (quantized, alone, dense)]
    assert step_bytes == sorted(step_bytes) and step_bytes[1] < step_bytes[2]
    assert alone["quality"]["kl_vs_parent"] == alone["quality"]["kl_vs_dense"] > 0
    assert quantized["path"] == "onnx-int8" and (out / "onnx-int8/quantization.json").is_file()
    assert quantized["decode_bytes_per_step"] < pruned["decode_bytes_per_step"]
    assert 0 < quantized["quality"]["kl_vs_parent"] < quantized["quality"]["kl_vs_dense"]
    assert stages_of(out)["onnx"] == stages_of(finished)["onnx"]  # taken from disk, not made again
    order = list(stages_of(out))
    assert order.index("verify") < order.index("dense-onnx-int8") < order.index("quality")
    coverage = stages_of(out)["onnx-int8"]["result"]["coverage"]
    counted = f"{coverage['promised']} of {coverage['promised']}"
    assert f"| pruned-int8 | {counted} |" in (out / "report.md").read_text()


def test_engines_of_every_model_are_stages_of_the_run(finished: Path, model: str, tmp_path: Path) -> None:
    needs("tensorrt_rtx")
    out = copied(finished, tmp_path)
    prune_export(model, out=out, resume=True, engines=["tensorrt-rtx"], **OPTIONS)
    stages = stages_of(out)
    assert list(stages).index("engine-pruned") < list(stages).index("quality")
    for name in ("pruned", "dense"):
        (engine,) = stages[f"engine-{name}"]["result"]["engines"]
        assert (out / f"engine/{name}.engine").stat().st_size == engine["engine_bytes"] > 0
        assert f"engine/{name}.engine" in stages[f"engine-{name}"]["files"]
        assert f"| {name} (fp16, cache concat) |" in (out / "report.md").read_text()
    before = (out / "engine/pruned.engine").stat().st_mtime_ns
    prune_export(model, out=out, resume=True, engines=["tensorrt-rtx"], **OPTIONS)
    assert (out / "engine/pruned.engine").stat().st_mtime_ns == before


def test_linears_that_do_not_run_in_integers_are_reported_and_exit_with_3(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(finished, tmp_path)
    none = Coverage(promised=2, found=0, operators={}, missing=("a", "b"))
    monkeypatch.setattr(quantized_folder, "coverage_of", lambda *args, **options: none)
    with pytest.raises(VerificationError, match=r"in float still run a, b"):
        quantize_folder(out, Quantization(scheme="int8", smooth=0.5))
    assert (out / "onnx-int8/model.onnx").is_file()
    assert "Quantization did not hold its promise" in (out / "report.md").read_text()


def test_the_head_is_quantized_on_request_and_a_resumed_run_keeps_to_it(
    finished: Path, model: str, tmp_path: Path
) -> None:
    out = copied(finished, tmp_path)
    options = {**OPTIONS, "resume": True, "quantize": ["w8"], "baseline": False, "run_benchmark": False}
    prune_export(model, out=out, quantize_head=True, **options)
    (graph,) = open_folder(out / "onnx")
    covered = stages_of(out)["onnx-w8"]["result"]["coverage"]
    large = [linear.name for linear in graph.linears if min(linear.K, linear.N) >= 16]
    assert covered["found"] == covered["promised"] == len(large) and large[-1] == "lm_head"
    assert json.loads((out / "onnx-w8/quantization.json").read_text())["linears"] == large
    written = onnx.load(out / "onnx-w8/model.onnx", load_external_data=False).graph
    [logits] = [node for node in written.node if "logits" in node.output]
    assert logits.op_type == "MatMulNBits"  # ONNX Runtime's integer kernel computes them
    with pytest.raises(NirvanaError, match=r"quantize_head True, not False"):
        prune_export(model, out=out, **options)


def test_a_variant_made_later_is_measured_by_the_next_run(finished: Path, model: str, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    record = quantize_folder(out, Quantization(scheme="int8", smooth=0.5))
    assert record["coverage"]["found"] == record["coverage"]["promised"] > 0
    done = prune_export(model, out=out, resume=True, quantize=["int8"], baseline_quantized=False, **OPTIONS)
    assert done.benchmark is not None
    assert [v["name"] for v in done.benchmark["variants"]] == ["dense", "pruned", "pruned-int8"]
    assert stages_of(out)["quality"]["result"]["variants"].keys() == {"dense", "pruned", "pruned-int8"}


def test_a_folder_cut_by_a_plan_has_no_calibration_set(model: str, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "by-plan"
    prune_by_plan(model, plan=finished / "plan.json", out=out)
    with pytest.raises(NirvanaError, match="no ONNX model yet"):
        quantize_folder(out, Quantization(scheme="int8"))


def test_an_unknown_scheme_is_refused_before_any_work(model: str, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"Unknown scheme 'int9'"):
        quantize_folder(finished, Quantization(scheme="int9"))
    with pytest.raises(
        NirvanaError, match=r"quantize = \['int9'\] is not allowed; .*'int8'.*\. Did you mean 'int8'"
    ):
        prune_export(model, out=tmp_path / "out", quantize=["int9"], **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_resume_takes_finished_stages_from_disk_and_redoes_the_rest(
    finished: Path, model: str, tmp_path: Path
) -> None:
    out = copied(finished, tmp_path)
    manifest = json.loads((out / "manifest.json").read_text())
    for stage in manifest["stages"].values():
        stage["seconds"] = 12345.0  # as no stage of this run takes
    (out / "manifest.json").write_text(json.dumps(manifest))
    before = stages_of(out)
    (out / "onnx" / "model.onnx.data").write_bytes(b"damaged")
    prune_export(model, out=out, resume=True, **OPTIONS)
    after = stages_of(out)
    assert list(after) == list(before)
    for name in ("calibrate", "score", "plan", "checkpoint", "dense-onnx"):
        assert after[name] == before[name]  # nothing that they need was made anew
    assert after["onnx"]["files"] == before["onnx"]["files"]  # made again, byte for byte
    for name in ("verify", "quality", "benchmark"):
        assert after[name]["seconds"] != before[name]["seconds"]


def test_resume_with_other_options_or_weights_is_refused(finished: Path, model: str, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    with pytest.raises(NirvanaError, match=r"made with sparsity 0\.3, not 0\.2"):
        prune_export(model, out=out, resume=True, **{**OPTIONS, "sparsity": 0.2})
    other = write_tiny(tmp_path / "other", "llama-tied")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["options"]["model"] = str(other)
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(NirvanaError, match="other weights"):
        prune_export(str(other), out=out, resume=True, **OPTIONS)


def test_an_existing_folder_is_refused_and_left_alone(finished: Path, model: str, tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"exists already\. It holds a run[^\0]*--resume[^\0]*--force"):
        prune_export(model, out=finished, **OPTIONS)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(NirvanaError, match="It is not empty"):
        prune_export(model, out=mine, until="checkpoint", **OPTIONS)
    prune_export(model, out=mine, force=True, until="checkpoint", **OPTIONS)
    assert (mine / "thesis.txt").read_text() == "precious"


def test_prune_then_prune_export_continues(model: str, tmp_path: Path) -> None:
    out = prune_export(model, out=tmp_path / "out", until="checkpoint", **OPTIONS).out
    scored = stages_of(out)["score"]
    prune_export(model, out=out, resume=True, run_benchmark=False, **OPTIONS)
    assert stages_of(out)["score"] == scored and "verify" in stages_of(out)
    assert "benchmark" not in stages_of(out)


def test_the_same_seed_gives_the_same_plan(finished: Path, model: str, tmp_path: Path) -> None:
    out = prune_export(model, out=tmp_path / "again", until="checkpoint", **OPTIONS).out
    assert (out / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()
    other = prune_export(model, out=tmp_path / "other", seed=1, until="checkpoint", **OPTIONS).out
    assert (other / "plan.json").read_bytes() != (finished / "plan.json").read_bytes()


def test_a_plan_alone_redoes_the_cut(finished: Path, model: str, tmp_path: Path) -> None:
    prune_by_plan(model, plan=finished / "plan.json", out=tmp_path / "again")
    for file in ("plan.json", "checkpoint/model.safetensors", "checkpoint/config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (finished / file).read_bytes()
    other = write_tiny(tmp_path / "other", "mistral")
    with pytest.raises(NirvanaError, match="family is 'llama' in the plan and 'mistral' in the model"):
        prune_by_plan(str(other), plan=finished / "plan.json", out=tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_failed_verification_keeps_everything_and_says_where(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = export_stage.onnx_from_checkpoint

    def sabotaged(checkpoint: Any, out: Path, **kwargs: Any) -> Any:
        exported = original(checkpoint, out, **kwargs)
        data = np.fromfile(out / "model.onnx.data", dtype=np.float32)
        data[: len(data) // 2] *= -1.5
        data.tofile(out / "model.onnx.data")
        return exported

    monkeypatch.setattr(export_stage, "onnx_from_checkpoint", sabotaged)
    out = tmp_path / "out"
    with pytest.raises(VerificationError, match="does not compute what its checkpoint computes"):
        prune_export(model, out=out, **OPTIONS)
    recorded = stages_of(out)
    assert recorded["verify"]["result"]["pruned"]["passed"] is False
    assert (
        "benchmark" not in recorded
        and (out / "report.html").is_file()
        and (out / "onnx/model.onnx").is_file()
    )
    monkeypatch.undo()
    for folder in ("onnx", "dense/onnx"):
        (out / folder / "model.onnx.data").unlink()
    prune_export(model, out=out, resume=True, run_benchmark=False, **OPTIONS)
    assert stages_of(out)["verify"]["result"]["pruned"]["passed"] is True


def test_folder_commands_measure_and_check_again(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    text = tmp_path / "other.txt"
    text.write_text("A text of its own, long enough for a few windows of evaluation. " * 20)
    answers = (out / "answers.json").read_text()
    (out / "answers.json").write_text("lost")
    result = evaluate_folder(out, Evaluation(eval_text=text), Place(threads=1))
    assert result["source"] == "file other.txt" and (out / "answers.json").read_text() == answers
    benchmark = json.loads((out / "benchmark.json").read_text())
    assert benchmark["variants"][1]["quality"] == result["variants"]["pruned"]
    workload = Workload(prompt_tokens=4, new_tokens=2, repeats=1, threads=1)
    assert benchmark_folder(out, workload)["workload"]["prompt_tokens"] == 4
    check = verifying.verify_folder(out, threads=1)
    assert check.damaged == [] and set(check.reports) == {"pruned", "dense"}
    check.require_passed()
    (out / "report.md").write_text("lost")
    assert CliRunner().invoke(commands, ["report", str(out)]).exit_code == 0
    assert Run.open(out).damaged("report") == []
    (out / "plan.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"missing or different: plan\.json\."):
        verifying.verify_folder(out, threads=1).require_passed()


def test_verify_vouches_for_nothing_that_is_not_promised(
    finished: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verdict(out: Path) -> tuple[int, str]:
        result = CliRunner().invoke(commands, ["verify", str(out), "--threads", "1"])
        assert result.exception is None or isinstance(result.exception, VerificationError)
        return getattr(result.exception, "exit_code", 0), str(result.exception or result.output)

    class KilledError(Exception):
        """Stands for SIGKILL."""

    def killed(*_arguments: object, **_keywords: object) -> None:
        raise KilledError

    assert verdict(finished)[0] == 0
    cut = prune_export(model, out=tmp_path / "cut", until="checkpoint", **OPTIONS).out
    code, message = verdict(cut)
    assert code == 3 and "was never exported" in message
    out = copied(finished, tmp_path)
    (out / "onnx/extra.onnx").write_text("?")
    code, message = verdict(out)
    assert code == 3 and "does not list: onnx/extra.onnx.\n" in message
    (out / "onnx/extra.onnx").unlink()
    monkeypatch.setattr("nirvana_deploy.prune.stage.score_units", killed)
    with pytest.raises(KilledError):
        prune_export(model, out=out, force=True, **OPTIONS)
    code, message = verdict(out)
    assert code == 3 and "is incomplete: the last stage is calibrate.\n" in message
    for what in ("--gguf", "--triton"):  # the checkpoint and the model of the run before
        refused = CliRunner().invoke(commands, ["package", str(out), what])
        assert isinstance(refused.exception, NirvanaError) and "another run" in refused.exception.message


@pytest.mark.slow  # a short form of benchmarks/campaign runs always
def test_a_kill_at_any_moment_leaves_nothing_that_looks_whole(model: str, tmp_path: Path) -> None:
    """Kill the job after ever longer times; every file that the manifest lists must be whole, then finish."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "nirvana_deploy",
        "prune-export",
        model,
        "--out",
        str(out),
        "--no-benchmark",
    ]
    command += ["--preset", "paper", "--sparsity", "0.3", "--gamma", "1", "--round-to", "4"]
    command += ["--num-sequences", "4", "--seq-len", "16"]
    killed = 0
    for attempt, wait_s in enumerate((4.0, 5.5, 7.0)):
        process = subprocess.Popen(
            [*command, *(["--resume"] if attempt else [])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        if (out / "manifest.json").is_file():
            run = Run.open(out)
            assert all(not run.damaged(name) for name in run.manifest["stages"])
            folders = [path for path in (out / "checkpoint", out / "onnx") if path.is_dir()]
            assert all((folder / "tokenizer.json").is_file() for folder in folders)
    assert killed
    result = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not [path for path in out.rglob("*") if temporary.PREFIX in path.name]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_continue_and_leaves_nothing(
    model: str, tmp_path: Path, how: signal.Signals
) -> None:
    script = INTERRUPTIBLE + "from nirvana_deploy.cli.main import main; main()"
    arguments = [
        "prune-export",
        model,
        "--preset",
        "paper",
        "--sparsity",
        "0.3",
        "--out",
        str(tmp_path / "o"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "o" / "manifest.json").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in stderr and "Traceback" not in stderr
    left = {path.name for path in (tmp_path / "o").iterdir()}
    assert LOCK not in left and not [name for name in left if name.startswith(temporary.PREFIX)]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sparsity": 0.0}, r"sparsity must be above 0 and at most 0\.\d+ \(the largest feasible"),
        ({"sparsity": 0.97}, r"sparsity must be above 0 and at most 0\.\d+ \(the largest feasible"),
        ({"saliency": "nirvanna"}, "Did you mean 'nirvana'"),
        ({"seq_len": 513}, "longer than the model's 512 positions"),
        ({"calib": "no-such-file.txt"}, "no-such-file.txt does not exist"),
        ({"eval_text": "no-such-file.txt"}, "no-such-file.txt does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    model: str, tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(NirvanaError, match=complaint):
        prune_export(model, out=tmp_path / "out", **{**OPTIONS, **change})
    written = [path.name for path in (tmp_path / "out").rglob("*")] if (tmp_path / "out").exists() else []
    assert sorted(written) in ([], ["manifest.json", "recipe.toml"])


@pytest.mark.skipif(is_root(), reason="root may write anywhere")
def test_a_read_only_place_is_named(model: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(NirvanaError, match="permission is denied"):
        prune_export(model, out=tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("best", r"^Fitting the output of 48 inputs needs at least .*B of memory, and .* are free\."),
        ("paper", r"^Verifying the model, in torch and in ONNX Runtime at once, needs at least"),
    ],
)
def test_memory_that_cannot_suffice_is_said_before_the_start(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, said: str
) -> None:
    monkeypatch.setattr(resources, "free_memory_bytes", lambda: 100)
    with pytest.raises(NirvanaError, match=said):
        prune_export(model, out=tmp_path / "out", sparsity=0.3, preset=preset)
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_names_the_stage(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nirvana_deploy.prune.checkpoint.save_file", lambda *_, **__: torch.empty(1 << 50))
    with pytest.raises(NirvanaError, match=r"^The stage 'checkpoint' ran out of memory: .*\nEnd other"):
        prune_export(model, out=tmp_path / "out", **OPTIONS)
    assert not [path for path in (tmp_path / "out").rglob("*") if temporary.PREFIX in path.name]


def test_a_full_disk_is_named(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nirvana_deploy.prune.checkpoint.save_file", full)
    with pytest.raises(NirvanaError, match=r"Cannot write .*checkpoint: the disk is full"):
        prune_export(model, out=tmp_path / "out", until="checkpoint", **OPTIONS)
    assert not (tmp_path / "out" / "checkpoint").exists()
    assert not [path for path in (tmp_path / "out").rglob("*") if temporary.PREFIX in path.name]
    assert "plan" in stages_of(tmp_path / "out")


def test_too_little_space_is_said_before_the_work(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _path: _Usage())
    with pytest.raises(NirvanaError, match=r"has 1\.00 kB free"):
        prune_export(model, out=tmp_path / "out", until="checkpoint", **OPTIONS)


class _Usage:
    free = 1000


def copied(folder: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_the_least_kl_is_taken_where_there_is_a_choice(model: str, tmp_path: Path) -> None:
    options = {key: value for key, value in OPTIONS.items() if key != "gamma"}
    done = prune_export(
        model,
        out=tmp_path / "out",
        saliency="nirvana,random",
        gamma="auto",
        candidates=2,
        selection_sequences=4,
        selection_len=16,
        run_benchmark=False,
        **options,
    )
    result = done.manifest["stages"]["select"]["result"]
    tried = result["selection"]["candidates"]
    assert len(tried) >= 2 * 2 + 2  # two sets for nirvana, none for random; two or more gammas
    best = min(tried, key=lambda one: one["kl"])
    assert (done.plan.saliency, done.plan.gamma) == (best["saliency"], best["gamma"])
    assert done.plan.selection is not None and done.plan.selection["kl"]["min"] == best["kl"]
    assert "calibrate" not in done.manifest["stages"] and "score" not in done.manifest["stages"]
    assert done.report is not None and "selection" in done.report.read_text()


def test_uniform_layers_export_and_verify(model: str, tmp_path: Path) -> None:
    done = prune_export(model, out=tmp_path / "out", allocation="uniform", run_benchmark=False, **OPTIONS)
    assert len({(len(layer.kept_groups), len(layer.kept_neurons)) for layer in done.plan.layers}) == 1
    config = json.loads((done.out / "checkpoint" / "config.json").read_text())
    assert "auto_map" not in config and "per_layer_config" not in config
