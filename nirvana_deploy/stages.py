"""Each stage inside a run: read what the stage before wrote, do the work, say what to remember.

The stages themselves know nothing of folders of runs or manifests; this module does, and nothing else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.artifact import sha256_of
from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.export.verify import VerifyReport, verify_onnx
from nirvana_deploy.measure.report import write_report
from nirvana_deploy.model.checkpoint import config_json, load_tokenizer
from nirvana_deploy.model.shape import ModelShape, shape_from_config
from nirvana_deploy.model.sources import ModelFolder
from nirvana_deploy.model.weights import SafetensorsWeights, check_weights
from nirvana_deploy.progress import Progress
from nirvana_deploy.prune.calibrate import (
    CalibrationData,
    TokenWindows,
    calibration_candidates,
    calibration_data,
    windows_of_text,
)
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import (
    PrunePlan,
    make_plan,
    read_plan,
    write_plan,
)
from nirvana_deploy.prune.reconstruct import DEFAULT_RIDGE, reconstruct_layers
from nirvana_deploy.prune.score import score_units
from nirvana_deploy.prune.select import calibration_record, select_calibration
from nirvana_deploy.prune.texts import read_text_file
from nirvana_deploy.prune.windows_file import read_scores, read_windows, write_scores, write_windows
from nirvana_deploy.run import Run
from nirvana_deploy.variants import CHECKPOINT, DENSE_ONNX, ONNX, PLAN_FILE, variant_named

CALIBRATION_FILE = "calibration.safetensors"
SCORES_FILE = "scores.safetensors"
RECONSTRUCTION = "reconstruction"
QUALITY_FILE = "quality.json"
BENCHMARK_FILE = "benchmark.json"
HELDOUT_SEQUENCES, HELDOUT_LEN = 16, 256
SELECTION_SEQUENCES, SELECTION_LEN = 64, 128
_CALIBRATION_KEYS = ("source", "num_sequences", "seq_len", "text_sha256", "seed", "draw")


def checked_shape(checkpoint: Path, *, seq_len: int = 1) -> ModelShape:
    """The shape of a checkpoint whose config and tensors agree; raises NirvanaError before any work."""
    config = config_json(checkpoint)
    shape = shape_from_config(config)
    check_weights(SafetensorsWeights(checkpoint), shape)
    longest_tokens = config.get("max_position_embeddings")
    if longest_tokens is not None and seq_len > longest_tokens:
        raise NirvanaError(f"seq_len {seq_len} is longer than the model's {longest_tokens} positions.")
    return shape


def model_record(source: ModelFolder) -> dict[str, Any]:
    """What the manifest says about the input, sha256 included."""
    files = sorted([*source.path.glob("*.safetensors"), *source.path.glob("*.json")])
    return {
        "name": source.name,
        "origin": source.origin,
        "licence": source.licence,
        "path": str(source.path),
        "files": {file.name: sha256_of(file) for file in files},
    }


def calibrate(
    run: Run,
    source: ModelFolder,
    *,
    calib: str,
    num_sequences: int,
    seq_len: int,
    seed: int,
    eval_text: Path | str | None,
) -> None:
    """Draw the calibration windows and set the evaluation windows aside."""

    def work() -> dict[str, Any]:
        tokenizer = load_tokenizer(source.path)
        data = calibration_data(
            calib,
            tokenizer,
            num_sequences=num_sequences,
            seq_len=seq_len,
            seed=seed,
            heldout_sequences=HELDOUT_SEQUENCES if eval_text is None else 0,
            heldout_len=HELDOUT_LEN,
            model_path=source.path,
            progress=run.progress,
        )
        if eval_text is not None:
            windows = evaluation_windows(Path(eval_text), tokenizer, run.progress)
            data = CalibrationData(calibration=data.calibration, heldout=windows)
        write_windows(data, run.out / CALIBRATION_FILE)
        return {
            **calibration_record(data.calibration),
            **_evaluation_record(data.heldout, held_out=eval_text is None),
        }

    run.stage("calibrate", [CALIBRATION_FILE], work)


@dataclass(frozen=True)
class Choices:
    """What the selector chooses among; one of each means that there is nothing to choose."""

    corpora: tuple[str, ...]
    candidates: int
    """Disjoint calibration sets drawn from each corpus."""
    saliencies: tuple[str, ...]
    gammas: tuple[float, ...]

    @property
    def single(self) -> bool:
        """Whether there is only one candidate."""
        return len(self.corpora) * self.candidates * len(self.saliencies) * len(self.gammas) == 1


def select(
    run: Run,
    source: ModelFolder,
    *,
    choices: Choices,
    sparsity: float,
    allocation: str,
    round_to: int,
    num_sequences: int,
    seq_len: int,
    seed: int,
    micro_batch: int,
    eval_text: Path | str | None,
) -> tuple[str, float]:
    """Choose calibration set, saliency and gamma by held-out KL; returns the winner's saliency and gamma.

    Takes the place of :func:`calibrate` and :func:`score`. The KL is measured on every other held-out
    window; quality is later measured on the rest, so that no number is quoted on what it was chosen by.
    """

    def work() -> dict[str, Any]:
        tokenizer = load_tokenizer(source.path)
        sets = [
            calibration_candidates(
                corpus,
                tokenizer,
                candidates=choices.candidates,
                num_sequences=num_sequences,
                seq_len=seq_len,
                seed=seed,
                heldout_sequences=2 * SELECTION_SEQUENCES // len(choices.corpora),
                heldout_len=SELECTION_LEN,
                model_path=source.path,
                progress=run.progress,
            )
            for corpus in choices.corpora
        ]
        selection = select_calibration(
            source.path,
            [windows for one in sets for windows in one.calibrations],
            [every_other(one.heldout, 0) for one in sets],
            sparsity=sparsity,
            saliencies=choices.saliencies,
            gammas=choices.gammas,
            allocation=allocation,
            round_to=round_to,
            seed=seed,
            model_name=source.name,
            micro_batch=micro_batch,
            progress=run.progress,
        )
        run.progress.note(selection.verdict)
        chosen = selection.calibration or sets[0].calibrations[0]  # magnitude and random read no text
        heldout = every_other(sets[0].heldout, 1)
        if eval_text is not None:
            heldout = evaluation_windows(Path(eval_text), tokenizer, run.progress)
        write_windows(CalibrationData(calibration=chosen, heldout=heldout), run.out / CALIBRATION_FILE)
        write_scores(selection.scores, run.out / SCORES_FILE)
        return {
            **calibration_record(chosen),
            "saliency": selection.plan.saliency,
            "gamma": selection.plan.gamma,
            **_evaluation_record(heldout, held_out=eval_text is None),
            "selection": selection.to_json(),
        }

    result = run.stage("select", [CALIBRATION_FILE, SCORES_FILE], work)
    return result["saliency"], result["gamma"]


def every_other(windows: TokenWindows, first: int) -> TokenWindows:
    """Every second window of [M, T], from window ``first`` on."""
    return dataclasses.replace(
        windows, tokens=windows.tokens[first::2], positions=windows.positions[first::2]
    )


def _evaluation_record(windows: TokenWindows, *, held_out: bool) -> dict[str, Any]:
    return {
        "evaluation_source": windows.source + (" (held out of calibration)" if held_out else ""),
        "evaluation_text_sha256": windows.text_sha256,
    }


def drawn_record(run: Run) -> dict[str, Any]:
    """What is recorded of the calibration text, whichever stage drew it."""
    stages = run.manifest["stages"]
    result: dict[str, Any] = stages.get("select", stages.get("calibrate"))["result"]
    return result


def score(run: Run, source: ModelFolder, *, saliency: str, seed: int, micro_batch: int) -> None:
    """Score every unit on the calibration windows."""

    def work() -> dict[str, Any]:
        tokens = read_windows(run.out / CALIBRATION_FILE)["calibration"]
        scores = score_units(
            source.path,
            tokens,
            saliency=saliency,
            seed=seed,
            micro_batch=micro_batch,
            spill_folder=run.out,
            progress=run.progress,
        )
        write_scores(scores, run.out / SCORES_FILE)
        return {"saliency": saliency, "tokens": int(tokens.size), "micro_batch": micro_batch}

    run.stage("score", [SCORES_FILE], work)


def decide(
    run: Run,
    source: ModelFolder,
    shape: ModelShape,
    *,
    sparsity: float,
    gamma: float,
    allocation: str,
    round_to: int,
    saliency: str,
    seed: int,
    reconstruct: bool,
) -> PrunePlan:
    """Make the plan from the scores."""

    def work() -> dict[str, Any]:
        drawn = drawn_record(run)
        selection = drawn.get("selection")
        plan = make_plan(
            shape,
            read_scores(run.out / SCORES_FILE),
            sparsity=sparsity,
            gamma=gamma,
            allocation=allocation,
            round_to=round_to,
            saliency=saliency,
            seed=seed,
            model_name=source.name,
            calibration={key: drawn[key] for key in _CALIBRATION_KEYS},
        )
        if selection is not None:
            candidates = [{"name": one["name"], "kl": one["kl"]} for one in selection["candidates"]]
            plan = dataclasses.replace(plan, selection={"kl": selection["kl"], "candidates": candidates})
        if reconstruct:
            plan = dataclasses.replace(plan, reconstruct={"ridge": DEFAULT_RIDGE})
        write_plan(plan, run.out / PLAN_FILE)
        return dataclasses.asdict(plan.budget)

    run.stage("plan", [PLAN_FILE], work)
    plan = read_plan(run.out / PLAN_FILE)
    if reconstruct and plan.reconstruct is None:
        raise NirvanaError(
            f"{run.out} was planned by a version that does not reconstruct.",
            hint="Repeat the command with --force instead of --resume, or without --reconstruct.",
        )
    return plan


def reconstruct_stage(run: Run, source: ModelFolder, plan: PrunePlan) -> None:
    """Refit what the plan keeps of o and down on the calibration windows, where the plan says so."""
    if plan.reconstruct is None:
        return
    ridge = plan.reconstruct["ridge"]

    def work() -> dict[str, Any]:
        tokens = read_windows(run.out / CALIBRATION_FILE)["calibration"]
        folder = run.out / RECONSTRUCTION
        return dataclasses.asdict(
            reconstruct_layers(source.path, plan, tokens, folder, ridge=ridge, progress=run.progress)
        )

    run.stage("reconstruct", [RECONSTRUCTION], work)


def slice_stage(run: Run, source: ModelFolder, plan: PrunePlan) -> None:
    """Write the smaller checkpoint, with what :func:`reconstruct_stage` wrote where the plan says so."""

    def work() -> dict[str, Any]:
        shape = slice_checkpoint(
            source.path,
            plan,
            run.out / CHECKPOINT,
            reconstruction=run.out / RECONSTRUCTION if plan.reconstruct is not None else None,
            progress=run.progress,
        )
        return {"linear_parameters": shape.linear_parameters}

    run.stage("checkpoint", [CHECKPOINT], work)


def export(run: Run, source: ModelFolder, *, baseline: bool, dtype: str, flavor: str) -> None:
    """Export the smaller model and, by the same code, the dense one."""

    def work(checkpoint: Path, folder: str) -> dict[str, Any]:
        exported = onnx_from_checkpoint(
            checkpoint, run.out / folder, dtype=dtype, flavor=flavor, progress=run.progress
        )
        return {
            "nodes": exported.nodes,
            "weights_bytes": exported.weights_bytes,
            "opset": exported.options.opset,
            "dtype": dtype,
            "flavor": flavor,
        }

    run.stage("onnx", [ONNX], lambda: work(run.out / CHECKPOINT, ONNX))
    if baseline:
        run.stage("dense-onnx", [DENSE_ONNX], lambda: work(source.path, DENSE_ONNX))


def verify(
    run: Run, source: ModelFolder, *, baseline: bool, threads: int | None, redo: bool = False
) -> dict[str, VerifyReport]:
    """Prove both ONNX folders against their checkpoints; differences are a result, not an exception."""

    def work() -> dict[str, Any]:
        checkpoints = {"pruned": run.out / CHECKPOINT}
        if baseline:
            checkpoints["dense"] = source.path
        reports = {
            name: verify_onnx(
                checkpoint, run.out / variant_named(name).folder, threads=threads, progress=run.progress
            )
            for name, checkpoint in checkpoints.items()
        }
        return {name: report.to_json() for name, report in reports.items()}

    result = run.stage("verify", [], work, redo=redo)
    return {name: VerifyReport.from_json(report) for name, report in result.items()}


def evaluation_windows(
    path: Path,
    tokenizer: Any,
    progress: Progress,
    *,
    seq_len: int | None = None,
    max_sequences: int | None = None,
) -> TokenWindows:
    """Consecutive windows of a text file; 16 of 256 tokens unless told otherwise."""
    return windows_of_text(
        read_text_file(path),
        tokenizer,
        seq_len=seq_len or HELDOUT_LEN,
        max_sequences=max_sequences or HELDOUT_SEQUENCES,
        progress=progress,
    )


def write_pages(run: Run) -> Path:
    """Write report.md and report.html from the records of the run; always anew, it is cheap."""

    def work() -> None:
        write_report(run.out, progress=run.progress)

    run.stage("report", ["report.md", "report.html"], work, redo=True)
    return run.out / "report.html"
