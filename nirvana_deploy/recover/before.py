"""Refuse, before any work, a recovery that cannot be done."""

from __future__ import annotations

import importlib.util

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.calibrate.mixture import parts_of
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.quantize.schemes import scheme_named
from nirvana_deploy.recover.budget import Budget, budget_of, part_of
from nirvana_deploy.recover.data import MOST_WINDOWS, as_recover_text, require_text, watching_of
from nirvana_deploy.recover.learning.logs import require_log
from nirvana_deploy.recover.learning.needs import Work
from nirvana_deploy.recover.loop import micro_batch_of
from nirvana_deploy.recover.processes import require_fit
from nirvana_deploy.recover.recipe import Recovery, weights_of


def require_recovery(
    recipe: Recovery, dense: Checkpoint, *, seq_len: int, longest: int | None = None
) -> None:
    """Raise NirvanaError for a budget or a text that is of no use, MissingExtraError for a package.

    ``seq_len`` is the length of calibration windows; ``longest`` [the same] that of training windows which
    do not reach into text that is held out.
    """
    longest = longest or seq_len
    if (recipe.recover_seq_len or 0) > longest:
        raise NirvanaError(
            f"recover_seq_len must be at most {longest}, got {recipe.recover_seq_len}: longer windows would "
            "reach into the text that is held out.",
            hint="Cut with longer calibration windows: --seq-len.",
        )
    seq_len = recipe.recover_seq_len or seq_len
    budget = _budget(recipe)
    if budget.tokens is not None:
        budget.steps(recipe.recover_batch * seq_len, step_seconds=0.0)
    for package in ("accelerate", *(("peft",) if recipe.recover_method == "lora" else ())):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("Recovery", package=package, extra="recover")
    require_log(recipe.recover_log, method=recipe.recover_method)
    _require_rounding(recipe)
    _require_loss(recipe)
    require_fit(recipe)
    if not recipe.learning_rate > 0:
        raise NirvanaError(f"--learning-rate must be above 0, got {recipe.learning_rate:g}.")
    with as_recover_text():
        parts = parts_of(recipe.recover_text, writes_text=dense.shape.family.writes_text)
        require_text(parts, dense, (seq_len, longest), least=recipe.recover_batch)


def work_of(recipe: Recovery, dense: ModelShape, *, kept: float, seq_len: int) -> Work:
    """What decides how much memory and disk a recovery takes.

    ``kept`` is the share of linear weights in the cut, ``seq_len`` the length of calibration windows.
    """
    seq_len, budget = recipe.recover_seq_len or seq_len, _budget(recipe)
    known = budget.tokens is not None
    read = budget.tokens // seq_len if budget.tokens is not None else MOST_WINDOWS
    return Work(
        recipe,
        dense,
        kept=kept,
        seq_len=seq_len,
        micro_batch=micro_batch_of(recipe),
        windows=min(MOST_WINDOWS, read + watching_of(read)),
        windows_are_known=known,
    )


def _budget(recipe: Recovery) -> Budget:
    """Of each step."""
    return budget_of(part_of(recipe.recover or "", recipe.recover_steps))


def _require_rounding(recipe: Recovery) -> None:
    """Raise NirvanaError for a method that cannot train what is rounded."""
    if recipe.recover_for is None:
        return
    asked, hint = (
        f"--recover-for {recipe.recover_for}",
        "Pass --recover-method distill, or leave --recover-for out.",
    )
    if recipe.recover_method == "lora":
        raise NirvanaError(f"{asked} trains whole weights, and LoRA trains adapters beside them.", hint=hint)
    if scheme_named(recipe.recover_for).activation_bits is None:
        return
    if recipe.recover_method == "layers":
        raise NirvanaError(
            f"{asked} takes ranges of activations from the whole cut, and --recover-method layers has one "
            "block of it in memory.",
            hint=hint,
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtraError(asked, package="onnxruntime", extra="cpu")


def _require_loss(recipe: Recovery) -> None:
    """Raise NirvanaError for a loss of nothing, and for memory that is saved where none is spent."""
    if not any(weights_of(recipe)):
        raise NirvanaError(
            "All weights of the loss are 0: there is nothing to train by.",
            hint="Pass --kl-weight 1, --next-token-weight 1, or both.",
        )
    if recipe.recover_method == "layers" and recipe.recover_checkpointing:
        raise NirvanaError(
            "--recover-checkpointing saves memory of a whole model; --recover-method layers has one block.",
            hint="Leave --recover-checkpointing out.",
        )
