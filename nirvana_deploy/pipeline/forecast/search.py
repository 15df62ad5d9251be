"""What a search is going to take, before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.output.layout import MANIFEST
from nirvana_deploy.output.run import require_free
from nirvana_deploy.pipeline.forecast.costs import taken_stages
from nirvana_deploy.pipeline.forecast.forecast import Forecast, forecast, probed, without
from nirvana_deploy.pipeline.job import Job
from nirvana_deploy.pipeline.searching.cuts import cuts_of
from nirvana_deploy.pipeline.searching.search import cuts_in, job_of_search
from nirvana_deploy.search.recipe import Search, precisions_of, sparsities_of


@dataclass(frozen=True)
class SearchForecast:
    """What a search is going to take."""

    out: Path
    cuts: tuple[Forecast, ...]
    """In the order in which they are made; what one takes from another is counted there alone."""
    points: int
    refused: dict[str, str]
    """Cuts that cannot be made -> why; the search keeps their points with that."""

    @property
    def seconds(self) -> tuple[float, float]:
        """From, to: one cut after another."""
        return sum(cut.seconds[0] for cut in self.cuts), sum(cut.seconds[1] for cut in self.cuts)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        least, most = self.seconds
        cuts = [cut.to_json() for cut in self.cuts]
        return {
            "points": self.points,
            "seconds_least": least,
            "seconds_most": most,
            "cuts": cuts,
            "refused": self.refused,
        }


def forecast_search(
    model: str,
    *,
    out: Path | str | None = None,
    recipe: Search | None = None,
    base: Job | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> SearchForecast:
    """What ``search_points`` with the same arguments is going to take; writes nothing.

    What it makes of finished points, timing and zero-shot tasks, is left out. Raises NirvanaError where no
    cut can be made.
    """
    recipe = recipe or Search()
    job = job_of_search(model, recipe, options, base=base)
    points = cuts_in(job, recipe)
    out = Path(out) if out is not None else Path(f"{resolve_model(model, progress=progress).name}-search")
    require_free(out, resume=resume, force=force)
    cuts = cuts_of(out, job, points, points, points[0])
    jobs = {cut.folder: cut.job for cut in cuts}
    speed, found = probed(), []
    refused: dict[str, str] = {}
    for cut in cuts:
        again = (cut.folder / MANIFEST).is_file() and not force
        try:
            planned = forecast(
                cut.job,
                out=cut.folder,
                until="quality",
                resume=again,
                force=force,
                speed=speed,
                progress=progress,
            )
        except NirvanaError as error:
            refused[cut.folder.name] = error.message
            continue
        names = [one.name for one in planned.forecast.stages]
        others = [jobs[folder] for folder in cut.beside if folder.name not in refused]
        found.append(without(planned.forecast, taken_stages(names, cut.job, others)))
    if not found:
        name, why = next(iter(refused.items()))
        raise NirvanaError(f"No cut can be made. The first, {name}: {why}")
    count = (len(points) + (0.0 in sparsities_of(recipe))) * len(precisions_of(recipe))
    return SearchForecast(out, tuple(found), count, refused)
