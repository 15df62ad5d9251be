"""One command in several launched processes: the first runs it, the others take part in what is shared."""

from __future__ import annotations

from collections.abc import Callable

from nirvana_deploy.prune.curves import measure_curves
from nirvana_deploy.prune.refit import reconstruct
from nirvana_deploy.prune.streaming import score
from nirvana_deploy.prune.streaming.processes import follow, is_first, together
from nirvana_deploy.recover import shared

_TAKE_PART: dict[str, Callable[..., None]] = {
    score.SCORE: score.take_part,
    measure_curves.CURVES: measure_curves.take_part,
    reconstruct.REFIT: reconstruct.take_part,
    shared.RECOVER: shared.take_part,
}


def run_launched(command: Callable[[], int | None]) -> int | None:
    """Run ``command`` in the first process, and return what it does; the others return when it ends."""
    with together():
        if is_first():
            return command()
        follow(_TAKE_PART)
        return None
