"""Select, score, plan, reconstruct, slice: stages from windows to a smaller checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.calibrate.stage import (
    calibration_record,
    drawn_record,
    evaluation_record,
    evaluation_windows,
    every_other,
)
from nirvana_deploy.calibrate.windows import CalibrationData, calibration_candidates
from nirvana_deploy.calibrate.windows_file import read_windows, write_windows
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import CALIBRATION_FILE, CHECKPOINT, PLAN_FILE, RECONSTRUCTION, SCORES_FILE
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.choices import Choices
from nirvana_deploy.prune.plan import PrunePlan, make_plan, read_plan, write_plan
from nirvana_deploy.prune.recipe import Pruning
from nirvana_deploy.prune.reconstruct import DEFAULT_RIDGE, reconstruct_layers
from nirvana_deploy.prune.scores_file import read_scores, write_scores
from nirvana_deploy.prune.select import select_calibration
from nirvana_deploy.prune.streaming.score import score_units

_CALIBRATION_KEYS = ("source", "num_sequences", "seq_len", "text_sha256", "seed", "draw")


def select(
    run: Run, dense: Checkpoint, choices: Choices, calibration: Calibration, pruning: Pruning
) -> Stage:
    """Choose calibration set, saliency and gamma by held-out KL: in place of ``calibrate`` and ``score``.

    The KL is measured on every other held-out window; quality is later measured on the rest, so that no
    number is quoted on what it was chosen by. Its result holds the winner's ``saliency`` and ``gamma``.
    """

    def work() -> dict[str, Any]:
        sets = calibration_candidates(
            choices.corpora,
            dense,
            candidates=choices.candidates,
            num_sequences=calibration.num_sequences,
            seq_len=calibration.seq_len,
            seed=calibration.seed,
            heldout_sequences=2 * calibration.selection_sequences // len(choices.corpora),
            heldout_len=calibration.selection_len,
            progress=run.progress,
        )
        selection = select_calibration(
            dense,
            sets.calibrations,
            [every_other(windows, 0) for windows in sets.heldout],
            sparsity=pruning.sparsity,
            saliencies=choices.saliencies,
            gammas=choices.gammas,
            allocation=pruning.allocation,
            round_to=pruning.round_to,
            seed=calibration.seed,
            model_name=run.model_name,
            micro_batch=pruning.micro_batch,
            progress=run.progress,
        )
        run.progress.note(selection.verdict)
        chosen = selection.calibration or sets.calibrations[0]  # magnitude and random read no text
        evaluated = evaluation_windows(calibration, dense.tokenizer, run.progress)
        heldout = evaluated or every_other(sets.heldout[0], 1)
        write_windows(CalibrationData(calibration=chosen, heldout=heldout), run.out / CALIBRATION_FILE)
        write_scores(selection.scores, run.out / SCORES_FILE)
        return {
            **calibration_record(chosen),
            "saliency": selection.plan.saliency,
            "gamma": selection.plan.gamma,
            **evaluation_record(calibration, heldout),
            "selection": selection.to_json(),
        }

    return Stage(stage.SELECT, needs=(), makes=(CALIBRATION_FILE, SCORES_FILE), work=work)


def score(run: Run, dense: Checkpoint, recipe: Pruning, *, saliency: str, seed: int) -> Stage:
    """Score every unit on the calibration windows."""

    def work() -> dict[str, Any]:
        tokens = read_windows(run.out / CALIBRATION_FILE)["calibration"]
        scores = score_units(
            dense,
            tokens,
            saliency=saliency,
            seed=seed,
            micro_batch=recipe.micro_batch,
            spill_folder=run.out,
            progress=run.progress,
        )
        write_scores(scores, run.out / SCORES_FILE)
        return {"saliency": saliency, "tokens": int(tokens.size), "micro_batch": recipe.micro_batch}

    return Stage(stage.SCORE, needs=(stage.CALIBRATE,), makes=(SCORES_FILE,), work=work)


def plan(run: Run, dense: Checkpoint, recipe: Pruning, *, saliency: str, gamma: float, seed: int) -> Stage:
    """Decide what goes, from the scores."""

    def work() -> dict[str, Any]:
        drawn = drawn_record(run)
        made = make_plan(
            dense.shape,
            read_scores(run.out / SCORES_FILE),
            sparsity=recipe.sparsity,
            gamma=gamma,
            allocation=recipe.allocation,
            round_to=recipe.round_to,
            saliency=saliency,
            seed=seed,
            model_name=run.model_name,
            calibration={key: drawn[key] for key in _CALIBRATION_KEYS},
        )
        if (selection := drawn.get("selection")) is not None:
            candidates = [{"name": one["name"], "kl": one["kl"]} for one in selection["candidates"]]
            made = dataclasses.replace(made, selection={"kl": selection["kl"], "candidates": candidates})
        if recipe.reconstruct:
            made = dataclasses.replace(made, reconstruct={"ridge": DEFAULT_RIDGE})
        write_plan(made, run.out / PLAN_FILE)
        return dataclasses.asdict(made.budget)

    return Stage(
        stage.PLAN, needs=(stage.SELECT, stage.CALIBRATE, stage.SCORE), makes=(PLAN_FILE,), work=work
    )


def given_plan(run: Run, decided: PrunePlan) -> Stage:
    """Take a plan that was decided elsewhere."""
    return Stage(
        stage.PLAN, needs=(), makes=(PLAN_FILE,), work=lambda: write_plan(decided, run.out / PLAN_FILE)
    )


def planned(run: Run, *, reconstruct: bool) -> PrunePlan:
    """The plan of a run; raises NirvanaError where a resumed one knows nothing of a wanted reconstruction."""
    found = read_plan(run.out / PLAN_FILE)
    if reconstruct and found.reconstruct is None:
        raise NirvanaError(
            f"{run.out} was planned by a version that does not reconstruct.",
            hint="Repeat the command with --force instead of --resume, or without --reconstruct.",
        )
    return found


def reconstruct(run: Run, dense: Checkpoint, plan: PrunePlan) -> Stage | None:
    """Refit what the plan keeps of o and down on the calibration windows; None unless the plan says so."""
    if plan.reconstruct is None:
        return None
    ridge = plan.reconstruct["ridge"]

    def work() -> dict[str, Any]:
        tokens = read_windows(run.out / CALIBRATION_FILE)["calibration"]
        folder = run.out / RECONSTRUCTION
        return dataclasses.asdict(
            reconstruct_layers(dense, plan, tokens, folder, ridge=ridge, progress=run.progress)
        )

    needs = (stage.PLAN, stage.SELECT, stage.CALIBRATE)
    return Stage(stage.RECONSTRUCT, needs=needs, makes=(RECONSTRUCTION,), work=work)


def slice_model(run: Run, dense: Checkpoint, plan: PrunePlan) -> Stage:
    """Write the smaller checkpoint, with what :func:`reconstruct` wrote, if anything."""

    def work() -> dict[str, Any]:
        shape = slice_checkpoint(
            dense,
            plan,
            run.out / CHECKPOINT,
            reconstruction=run.out / RECONSTRUCTION if plan.reconstruct is not None else None,
            progress=run.progress,
        )
        return {"linear_parameters": shape.linear_parameters}

    return Stage(stage.CHECKPOINT, needs=(stage.PLAN, stage.RECONSTRUCT), makes=(CHECKPOINT,), work=work)
