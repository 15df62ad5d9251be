"""What a recovery asks of the processes that share it."""

from __future__ import annotations

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.prune.streaming.processes import count


def require_fit(*, method: str, step_windows: int) -> None:
    """Raise NirvanaError for processes that a recovery cannot use."""
    if method == "layers" and count() > 1:
        raise NirvanaError(
            f"--recover-method {method} runs in one process, and {count()} were launched.",
            hint="Start nirvana-deploy without the launcher.",
        )
    share_of(step_windows)


def share_of(step_windows: int) -> int:
    """Windows of a step that each process reads; raises NirvanaError where they do not come out even."""
    if step_windows % count():
        raise NirvanaError(
            f"A step of {step_windows} windows cannot be shared evenly by {count()} processes.",
            hint=f"Pass --recover-batch {-(-step_windows // count()) * count()}.",
        )
    return step_windows // count()
