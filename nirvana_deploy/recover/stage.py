"""Recover: the stage between the refit and the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.temporary import scratch_folder
from nirvana_deploy.base.recipe import fields_of
from nirvana_deploy.base.resources import free_memory_bytes
from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.calibrate.stage import segment_tokens
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import CALIBRATION_FILE, RECONSTRUCTION, RECOVERY, RECOVERY_STATE
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import WHOLE, Stage, Step
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.plan import PrunePlan
from nirvana_deploy.prune.streaming.processes import count
from nirvana_deploy.recover.before import work_of
from nirvana_deploy.recover.budget import part_of
from nirvana_deploy.recover.learning.compared import streamed_quality
from nirvana_deploy.recover.learning.needs import require_room
from nirvana_deploy.recover.recipe import Recovery
from nirvana_deploy.recover.record import Recovered
from nirvana_deploy.recover.recovery import TextWanted, recover_checkpoint


@dataclass(frozen=True)
class Models:
    """What a recovery begins with."""

    dense: Checkpoint
    """The teacher."""
    source: Checkpoint
    """What is cut: the dense model, or what the step before made of it, in its shape."""


@dataclass(frozen=True)
class Answers:
    """What the cut is asked for, before it is trained."""

    prompts: Sequence[str]
    new_tokens: int
    """At most, for each."""


def recover(
    run: Run,
    models: Models,
    plan: PrunePlan,
    recipe: Recovery,
    calibration: Calibration,
    asked: Answers,
    step: Step = WHOLE,
) -> Stage:
    """Train the cut of ``plan`` toward the dense model; keeps what changed, for the checkpoint to take.

    The record holds what the cut wrote when ``asked``, and its quality before. A ``step`` before the last
    trains without rounding, which comes in when all is cut. Each step draws text of its own.
    """
    folder, dense = step.folder(run.out), models.dense
    seq_len = recipe.recover_seq_len or calibration.seq_len

    def work() -> Recovered:
        kept = plan.budget.linear_parameters_kept / plan.budget.linear_parameters_dense
        require_room(work_of(recipe, dense.shape, kept=kept, seq_len=seq_len), run.out)
        with scratch_folder(run.out) as scratch:
            refit = folder / RECONSTRUCTION if plan.reconstruct is not None else None
            slice_checkpoint(models.source, plan, scratch / "cut", reconstruction=refit)
            cut = Checkpoint.open(scratch / "cut")
            heldout = read_windows(run.out / CALIBRATION_FILE)["heldout"]
            kl, loss = streamed_quality(cut, dense, heldout, progress=run.progress)
            told = step.last and _can_answer(cut)
            answers = greedy_answers(cut, asked.prompts, asked.new_tokens) if told else ()
            done = recover_checkpoint(
                cut,
                dense,
                replace(
                    recipe,
                    recover=part_of(recipe.recover or "", step.of),
                    recover_steps=1,
                    recover_for=recipe.recover_for if step.last else None,
                ),
                TextWanted(
                    seq_len=seq_len,
                    segment_tokens=segment_tokens(calibration, single=not run.has(stage.SELECT)),
                    seed=calibration.seed + step.number,
                ),
                folder / RECOVERY,
                state=run.out / RECOVERY_STATE,
                identity=identity(run, recipe, calibration, step),
                calibration=read_windows(run.out / CALIBRATION_FILE)["calibration"],
                progress=run.progress,
            )
        course, loop = done.course, done.loop
        if not course.kept_step:
            run.progress.note("Training made the held-out KL no better: the cut is kept as it was")
        if course.stopped:
            run.progress.note(course.stopped)
        return Recovered(
            options=options_of(recipe),
            seed=calibration.seed,
            text=done.text.train.source,
            text_sha256=done.text.train.text_sha256,
            train_windows=len(done.text.train.tokens),
            watch_windows=len(done.text.watch),
            window_tokens=seq_len,
            step_windows=loop.step_windows,
            steps=loop.steps,
            steps_done=course.steps_done,
            kept_step=course.kept_step,
            tokens=course.steps_done * loop.step_windows * seq_len,
            seconds=course.seconds,
            writing_seconds=done.writing_seconds,
            learning_rate=loop.learning_rate,
            trained_parameters=done.trained_parameters,
            stored_teacher=done.stored_teacher,
            bfloat16=done.loop.bfloat16,
            processes=count(),
            curve=course.curve,
            cut_kl=kl,
            cut_perplexity=math.exp(loss),
            answers_of_cut=answers,
            stopped=course.stopped,
            other_text=None if done.text.other is None else done.text.other.source,
        )

    needs = (stage.PLAN, stage.RECONSTRUCT, stage.SELECT, stage.CALIBRATE)
    return step.stage(Stage(stage.RECOVER, needs=needs, makes=(RECOVERY,), work=work))


def options_of(recipe: Recovery) -> dict[str, Any]:
    """The options as JSON."""
    return {field.name: getattr(recipe, field.name) for field in fields_of(Recovery)}


def _that_matter(options: dict[str, Any]) -> dict[str, Any]:
    """The options without those that change nothing of the result; what an older record lacks is default."""
    defaults = {field.name: field.default for field in fields_of(Recovery)}
    return {name: value for name, value in (defaults | options).items() if name != "recover_log"}


def identity(run: Run, recipe: Recovery, calibration: Calibration, step: Step = WHOLE) -> dict[str, Any]:
    """What must be the same for a training to be gone on with: options, model, plan and refit."""
    names = (stage.PLAN, step.named(stage.RECONSTRUCT))
    made = [run.manifest["stages"].get(name, {}).get("files", {}) for name in names]
    return {
        "options": _that_matter(options_of(recipe)),
        "seed": calibration.seed,
        "seq_len": calibration.seq_len,
        "model": run.manifest["model"]["files"],
        "cut": {file: sha256 for files in made for file, sha256 in files.items()},
    }


def forget_another(run: Run, recipe: Recovery, calibration: Calibration, step: Step = WHOLE) -> None:
    """Let a recovery with other options be made anew."""
    if run.has(name := step.named(stage.RECOVER)):
        done = run.result(name, dict[str, Any])
        same = _that_matter(done["options"]) == _that_matter(options_of(recipe))
        if not same or done["seed"] != calibration.seed:
            run.forget(name)


def require_same(run: Run, recipe: Recovery) -> None:
    """Raise NirvanaError for a resumed run whose model is recovered, and that asks for none."""
    if recipe.recover is None and run.has(stage.RECOVER):
        budget = run.result(stage.RECOVER, dict[str, Any])["options"]["recover"]
        raise NirvanaError(
            f"{run.out} holds a model that was recovered for {budget}, and --recover is missing.",
            hint=f"Repeat the command with --recover {budget}, or with --force to start again.",
        )


def _can_answer(cut: Checkpoint) -> bool:
    """Whether the cut writes text, and fits in memory: what trains block by block may not."""
    shape = cut.shape
    whole_bytes = 4 * (shape.linear_parameters + shape.embedding_parameters)
    return shape.family.writes_text and whole_bytes < free_memory_bytes()


def greedy_answers(cut: Checkpoint, prompts: Sequence[str], new_tokens: int) -> tuple[str, ...]:
    """What a decoder writes to ``prompts`` in transformers, at most ``new_tokens`` each."""
    model, tokenizer = cut.load(), cut.tokenizer
    stops = sorted(cut.stop_token_ids) or None
    texts = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")["input_ids"]
        written = model.generate(given, max_new_tokens=new_tokens, do_sample=False, eos_token_id=stops)
        texts.append(str(tokenizer.decode(written[0, given.shape[1] :], skip_special_tokens=True)))
    return tuple(texts)
