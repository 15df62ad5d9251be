"""Select, score, plan, reconstruct, slice: stages from windows to a smaller checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.stage import (
    _evaluation_record,
    calibration_record,
    drawn_record,
    evaluation_windows,
    every_other,
)
from nirvana_deploy.calibrate.windows import (
    CalibrationData,
    calibration_candidates,
)
from nirvana_deploy.calibrate.windows_file import read_windows, write_windows
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.sources import ModelFolder
from nirvana_deploy.output.layout import CALIBRATION_FILE, CHECKPOINT, PLAN_FILE, RECONSTRUCTION, SCORES_FILE
from nirvana_deploy.output.run import Run
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import (
    PrunePlan,
    make_plan,
    read_plan,
    write_plan,
)
from nirvana_deploy.prune.reconstruct import DEFAULT_RIDGE, reconstruct_layers
from nirvana_deploy.prune.scores_file import read_scores, write_scores
from nirvana_deploy.prune.select import select_calibration
from nirvana_deploy.prune.streaming.model import score_units

SELECTION_SEQUENCES, SELECTION_LEN = 64, 128


_CALIBRATION_KEYS = ("source", "num_sequences", "seq_len", "text_sha256", "seed", "draw")


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
        opened = Checkpoint.open(source.path)
        tokenizer = opened.tokenizer
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
                checkpoint=opened,
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
            Checkpoint.open(source.path),
            plan,
            run.out / CHECKPOINT,
            reconstruction=run.out / RECONSTRUCTION if plan.reconstruct is not None else None,
            progress=run.progress,
        )
        return {"linear_parameters": shape.linear_parameters}

    run.stage("checkpoint", [CHECKPOINT], work)
