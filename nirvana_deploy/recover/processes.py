"""What a recovery asks of the processes that share it."""

from __future__ import annotations

import os

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.prune.streaming.processes import count
from nirvana_deploy.recover.budget import budget_of
from nirvana_deploy.recover.learning.sharding import is_asked_for
from nirvana_deploy.recover.recipe import Recovery


def require_fit(recipe: Recovery) -> None:
    """Raise NirvanaError for processes that a recovery cannot use."""
    if recipe.recover_method == "layers" and count() > 1:
        raise NirvanaError(
            f"--recover-method layers runs in one process, and {count()} were launched.",
            hint="Start nirvana-deploy without the launcher.",
        )
    share_of(recipe.recover_batch)
    if is_asked_for():
        _require_parts(recipe)


def _require_parts(recipe: Recovery) -> None:
    """Raise NirvanaError for a model in parts (FSDP) that the recovery cannot train."""
    if count() == 1:
        raise NirvanaError(
            "FSDP puts a model in parts among processes, and one was launched.",
            hint="Pass --num_processes 2 or more to accelerate launch, or start nirvana-deploy without it.",
        )
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise NirvanaError(
            f"A recovery trains in parts by FSDP2, and version {version} is asked for.",
            hint="Pass --fsdp_version 2 to accelerate launch, or set fsdp_version: 2 in its configuration.",
        )
    for variable, instead in _SAID_ELSEWHERE.items():
        if os.environ.get(variable, "false").lower() not in ("", "false"):
            name = variable.lower().removeprefix("accelerate_")
            raise NirvanaError(f"The launcher asks for {name}, which a recovery does not do.", hint=instead)
    if budget_of(recipe.recover or "").seconds is not None:
        raise NirvanaError(
            f"Under FSDP a recovery takes a number of tokens, and {recipe.recover} is a time: how long a "
            "step takes is measured by one process on its own, which has no room for the whole model.",
            hint="Pass a number of tokens: --recover 200k, or --tokens 200000 of the command recover.",
        )


_SAID_ELSEWHERE = {
    "FSDP_ACTIVATION_CHECKPOINTING": "Leave it out there, and pass --recover-checkpointing here.",
    "FSDP_IGNORED_MODULES": "Leave it out: such weights would be trained by each process apart.",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "Leave it out: the processes share windows and parts of the model.",
}
"""What launchers tell that has no meaning here, and what has."""


def share_of(step_windows: int) -> int:
    """Windows of a step that each process reads; raises NirvanaError where they do not come out even."""
    if step_windows % count():
        raise NirvanaError(
            f"A step of {step_windows} windows cannot be shared evenly by {count()} processes.",
            hint=f"Pass --recover-batch {-(-step_windows // count()) * count()}.",
        )
    return step_windows // count()
