"""What a job with a budget is going to take, before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.pipeline.forecast.costs import taken_stages
from nirvana_deploy.pipeline.forecast.forecast import Forecast, forecast, probed, without
from nirvana_deploy.pipeline.job import JobOptions
from nirvana_deploy.pipeline.searching.target import folder_named, folder_of_trials, job_of_target
from nirvana_deploy.search.meeting import MOST_TRIALS
from nirvana_deploy.search.recipe import Target


@dataclass(frozen=True)
class TargetForecast:
    """What a job with a budget is going to take, each of its cuts as if it were the first one tried."""

    out: Path
    first: Forecast
    """Of the first cut that is tried."""
    further: Forecast
    """Of each further one, which takes from the first what does not depend on the sparsity."""
    job: Forecast
    """Of the job at the sparsity that was found, which takes what its trial made."""
    most_further: int = MOST_TRIALS - 1

    @property
    def seconds(self) -> tuple[float, float]:
        """From, to: the first cut meets the budget, or none does before the last."""
        least, most = (self.first.seconds[i] + self.job.seconds[i] for i in (0, 1))
        return least, most + self.most_further * self.further.seconds[1]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        least, most = self.seconds
        parts = {name: getattr(self, name).to_json() for name in ("first", "further", "job")}
        return {"seconds_least": least, "seconds_most": most, "most_further": self.most_further, **parts}


def forecast_target(
    model: str,
    target: Target,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    **options: Unpack[JobOptions],
) -> TargetForecast:
    """What ``meet_target`` with the same arguments is going to take; writes nothing.

    What is timed to find a sparsity, and the length of the finding itself, are not known before.
    """
    job = job_of_target(model, target, options)
    named = folder_named(resolve_model(model, progress=progress).name, target)
    out = Path(out) if out is not None else Path(named)
    folder = folder_of_trials(job, out, resume=resume, force=force)
    how: dict[str, Any] = {"speed": probed(), "progress": progress}
    first = forecast(job, out=folder / "first", until="quality", **how).forecast
    names = [one.name for one in first.stages]
    whole = forecast(job, out=out, resume=resume, force=force, **how).forecast
    return TargetForecast(out, first, without(first, taken_stages(names, job, [job])), without(whole, names))
