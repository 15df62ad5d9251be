"""Select, score, plan, reconstruct, slice: stages from windows to a smaller checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.temporary import scratch_folder
from nirvana_deploy.base.recipe import names_of
from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.calibrate.stage import (
    calibration_record,
    drawn_record,
    evaluation_record,
    evaluation_windows,
    every_other,
    windows_wanted,
)
from nirvana_deploy.calibrate.windows import CalibrationData, calibration_candidates
from nirvana_deploy.calibrate.windows_file import read_windows, write_windows
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import (
    CALIBRATION_FILE,
    CHECKPOINT,
    CURVES_FILE,
    PLAN_FILE,
    RECONSTRUCTION,
    RECOVERY,
    SCORES_FILE,
)
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import WHOLE, Stage, Step
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.choosing.choices import Choices
from nirvana_deploy.prune.choosing.select import select_cut
from nirvana_deploy.prune.curves.curve import Curves, read_curves, write_curves
from nirvana_deploy.prune.curves.facts import facts_of, require_curves_of
from nirvana_deploy.prune.curves.measure_curves import CURVE_TOKENS
from nirvana_deploy.prune.cutting import Cutter, reads_curves
from nirvana_deploy.prune.plan import PrunePlan
from nirvana_deploy.prune.plan_file import read_plan, write_plan
from nirvana_deploy.prune.recipe import Pruning
from nirvana_deploy.prune.refit.dense_states import DenseStates
from nirvana_deploy.prune.refit.reconstruct import Reconstruction
from nirvana_deploy.prune.saliency.gradient import saliency_named
from nirvana_deploy.prune.scores_file import read_scores, write_scores
from nirvana_deploy.prune.streaming.score import score_for_refit, score_units

OTHER_TEXT = "Calibrate as the run that measured them did, or leave --curves out."
"""A hint."""
_CUT = (*(name for name in names_of(Pruning) if name != "preset"), "seed")
"""The options that decide which units stay."""


def select(run: Run, cutter: Cutter, choices: Choices, calibration: Calibration) -> Stage:
    """Choose calibration set, saliency and gamma by held-out KL.

    In place of ``calibrate``, ``score`` and ``curves``. The KL is measured on every other held-out window;
    quality is later measured on the rest, so that no number is quoted on what it was chosen by. Its result
    holds the winner's ``saliency`` and ``gamma``.
    """
    dense = cutter.dense

    def work() -> dict[str, Any]:
        sets = calibration_candidates(
            choices.corpora,
            dense,
            candidates=choices.candidates,
            num_sequences=windows_wanted(calibration, dense.shape),
            seq_len=calibration.seq_len,
            seed=calibration.seed,
            heldout_sequences=2 * calibration.selection_sequences // len(choices.corpora),
            heldout_len=calibration.selection_len,
            progress=run.progress,
        )
        with scratch_folder(run.out) as scratch:
            selection = select_cut(
                cutter,
                sets.calibrations,
                [every_other(windows, 0) for windows in sets.heldout],
                saliencies=choices.saliencies,
                gammas=choices.gammas,
                scratch=scratch,
            )
        run.progress.note(selection.verdict)
        chosen = selection.calibration or sets.calibrations[0]  # magnitude and random read no text
        evaluated = evaluation_windows(calibration, dense.tokenizer, run.progress)
        heldout = evaluated or every_other(sets.heldout[0], 1)
        write_windows(CalibrationData(calibration=chosen, heldout=heldout), run.out / CALIBRATION_FILE)
        if selection.scores is not None:
            write_scores(selection.scores, run.out / SCORES_FILE)
        if selection.curves is not None:
            write_curves(selection.curves, run.out / CURVES_FILE)
        return {
            **calibration_record(chosen),
            "saliency": selection.plan.saliency,
            "gamma": selection.plan.gamma,
            **evaluation_record(calibration, heldout),
            "selection": selection.to_json(),
        }

    return Stage(stage.SELECT, needs=(), makes=(CALIBRATION_FILE, SCORES_FILE, CURVES_FILE), work=work)


def curves(run: Run, cutter: Cutter, given: Path | None = None) -> Stage:
    """Measure what each layer loses when it keeps less, on the calibration windows.

    Or take what was measured on them before, ``given`` as a file.
    """

    def work() -> dict[str, Any]:
        tokens = _windows(run)
        if given is None:
            found, taken = cutter.curves(tokens), {}
        else:
            found, taken = read_curves(given), {"taken_from": str(given)}
            require_curves_of(found, facts_of(cutter.dense, tokens), given, hint=OTHER_TEXT)
        write_curves(found, run.out / CURVES_FILE)
        return {"tokens": int(min(tokens.size, CURVE_TOKENS)), **taken}

    reads = ("seed", "round_to", "min_neurons")
    return Stage(stage.CURVES, needs=(stage.CALIBRATE,), makes=(CURVES_FILE,), work=work, reads=reads)


def score(run: Run, cutter: Cutter, *, saliency: str, states: DenseStates) -> Stage:
    """Score every unit on the calibration windows; ``states`` takes what a refit can use of that."""
    recipe = cutter.recipe

    def work() -> dict[str, Any]:
        tokens = _windows(run)
        if recipe.reconstruct and saliency_named(saliency).features is not None:
            scores = score_for_refit(
                cutter.dense,
                tokens,
                states,
                saliency=saliency,
                micro_batch=recipe.micro_batch,
                progress=run.progress,
            )
        else:
            scores = score_units(
                cutter.dense,
                tokens,
                saliency=saliency,
                seed=cutter.seed,
                micro_batch=recipe.micro_batch,
                spill_folder=run.out,
                progress=run.progress,
            )
        write_scores(scores, run.out / SCORES_FILE)
        return {"saliency": saliency, "tokens": int(tokens.size), "micro_batch": recipe.micro_batch}

    reads = ("seed", "saliency", "micro_batch")
    return Stage(stage.SCORE, needs=(stage.CALIBRATE,), makes=(SCORES_FILE,), work=work, reads=reads)


def plan(run: Run, cutter: Cutter, *, saliency: str, gamma: float | None) -> Stage:
    """Decide what goes, from scores, and from curves where they have a say."""

    def work() -> dict[str, Any]:
        drawn: dict[str, Any] = dict(drawn_record(run))
        made = cutter.plan(
            read_scores(run.out / SCORES_FILE),
            saliency=saliency,
            gamma=gamma,
            calibration=drawn,
            curves=_curves(run, cutter) if reads_curves(cutter.recipe, saliency) else None,
        )
        write_plan(_with_candidates(made, drawn), run.out / PLAN_FILE)
        return dataclasses.asdict(made.budget)

    needs = (stage.SELECT, stage.CALIBRATE, stage.CURVES, stage.SCORE, stage.UNIT_COST)
    return Stage(stage.PLAN, needs=needs, makes=(PLAN_FILE,), work=work, reads=_CUT)


def allocate(run: Run, cutter: Cutter) -> Stage:
    """Decide how many units of each layer stay; which ones, :func:`select_inside` decides."""

    def work() -> dict[str, Any]:
        allocated = cutter.allocated(_curves(run, cutter))
        counts = [dataclasses.asdict(one) for one in allocated.counts]
        return {"predicted_kl": allocated.predicted_kl, "counts": counts}

    needs = (stage.SELECT, stage.CALIBRATE, stage.CURVES, stage.UNIT_COST)
    return Stage(stage.PLAN, needs=needs, makes=(), work=work, reads=_CUT)


def select_inside(run: Run, cutter: Cutter, source: Checkpoint, step: Step = WHOLE) -> Stage:
    """Choose units and refit what stays, layer by layer, on the calibration windows.

    They are chosen in ``source``: the dense model, or what the step before made of it, in its shape.
    """

    def work() -> dict[str, Any]:
        drawn: dict[str, Any] = dict(drawn_record(run))
        allocated = cutter.allocated(_curves(run, cutter), step=step.number, steps=step.of)
        here, folder = cutter.at(source, step.number / step.of), step.folder(run.out)
        made, done = here.select(allocated, _windows(run), folder / RECONSTRUCTION, drawn)
        write_plan(_with_candidates(made, drawn), folder / PLAN_FILE)
        return {**_reconstructed(run, done), "steps": step.of}

    needs = (stage.PLAN, stage.SELECT, stage.CALIBRATE)
    makes = (PLAN_FILE, RECONSTRUCTION)
    reads = (*_CUT, "recover_steps")
    return step.stage(Stage(stage.RECONSTRUCT, needs=needs, makes=makes, work=work, reads=reads))


def forget_other_steps(run: Run, count: int) -> None:
    """Let cuts be made anew that were made in another number of steps."""
    for name in list(run.manifest["stages"]):
        of_step = name == stage.RECONSTRUCT or name.startswith(f"{stage.RECONSTRUCT}-")
        if of_step and run.has(name) and run.result(name, dict[str, Any]).get("steps", 1) != count:
            run.forget(name)


def given_plan(run: Run, decided: PrunePlan) -> Stage:
    """Take a plan that was decided elsewhere."""
    return Stage(
        stage.PLAN, needs=(), makes=(PLAN_FILE,), work=lambda: write_plan(decided, run.out / PLAN_FILE)
    )


def planned(run: Run, step: Step = WHOLE, *, reconstruct: bool) -> PrunePlan:
    """The plan of a run [up to a step].

    Raises NirvanaError where a resumed run knows nothing of a wanted reconstruction.
    """
    found = read_plan(step.folder(run.out) / PLAN_FILE)
    if reconstruct and found.reconstruct is None:
        raise NirvanaError(
            f"{run.out} was planned by a version that does not reconstruct.",
            hint="Repeat the command with --force instead of --resume, or without --reconstruct.",
        )
    return found


def reconstruct(run: Run, cutter: Cutter, plan: PrunePlan, seen: DenseStates) -> Stage:
    """Refit what the plan keeps of o and down on the calibration windows; ``seen`` is from scoring them."""

    def work() -> dict[str, Any]:
        return _reconstructed(run, cutter.refit(plan, _windows(run), run.out / RECONSTRUCTION, seen))

    needs = (stage.PLAN, stage.SELECT, stage.CALIBRATE)
    return Stage(stage.RECONSTRUCT, needs=needs, makes=(RECONSTRUCTION,), work=work, reads=_CUT)


def slice_model(run: Run, source: Checkpoint, plan: PrunePlan, step: Step = WHOLE) -> Stage:
    """Write the smaller checkpoint, with what :func:`reconstruct` and recovery wrote, if anything.

    It is cut from ``source``, as in :func:`select_inside`.
    """
    folder = step.folder(run.out)

    def work() -> dict[str, Any]:
        shape = slice_checkpoint(
            source,
            plan,
            folder / CHECKPOINT,
            reconstruction=folder / RECONSTRUCTION if plan.reconstruct is not None else None,
            recovery=folder / RECOVERY if run.has(step.named(stage.RECOVER)) else None,
            progress=run.progress,
        )
        return {"linear_parameters": shape.linear_parameters}

    needs = (stage.PLAN, stage.RECONSTRUCT, stage.RECOVER)
    return step.stage(Stage(stage.CHECKPOINT, needs=needs, makes=(CHECKPOINT,), work=work, reads=()))


def _windows(run: Run) -> NDArray[np.int64]:
    """The calibration windows [N, T]."""
    return read_windows(run.out / CALIBRATION_FILE)["calibration"]


def _curves(run: Run, cutter: Cutter) -> Curves:
    """The curves of this run; raises NirvanaError for those of another model or other windows."""
    path = run.out / CURVES_FILE
    found = read_curves(path)
    require_curves_of(found, facts_of(cutter.dense, _windows(run)), path)
    return found


def _with_candidates(made: PrunePlan, drawn: dict[str, Any]) -> PrunePlan:
    """The plan with the KL of every candidate, where there was a choice."""
    if (selection := drawn.get("selection")) is None:
        return made
    candidates = [{"name": one["name"], "kl": one["kl"]} for one in selection["candidates"]]
    return dataclasses.replace(made, selection={"kl": selection["kl"], "candidates": candidates})


def _reconstructed(run: Run, done: Reconstruction) -> dict[str, Any]:
    """The record of a refit; says aloud where it did not help."""
    if done.plain:
        run.progress.note(
            f"{len(done.plain)} of {len(done.explained_share)} output projections keep the plain cut: no "
            f"refit was better on held-out windows ({', '.join(done.plain[:3])}"
            f"{' ...' if done.plain[3:] else ''})."
        )
    return {**dataclasses.asdict(done), "plain": list(done.plain)}
