"""The cuts of a search: an output folder for each sparsity and way, what does not differ made once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import chdir, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError, QualityError, VerificationError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.recipe import Field, fields_of
from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.output.layout import MANIFEST
from nirvana_deploy.pipeline.job import Job, job_of
from nirvana_deploy.pipeline.presets import PRESETS
from nirvana_deploy.pipeline.prune_export import run_job
from nirvana_deploy.prune.recipe import Pruning
from nirvana_deploy.recover.recipe import Recovery
from nirvana_deploy.search.point import Point
from nirvana_deploy.search.recipe import Where
from nirvana_deploy.search.tally import Tally
from nirvana_deploy.search.ways import OWN, Way
from nirvana_deploy.search.workers import run_points

_JUDGING = frozenset({"sparsity", "eval_text", "heldout_sequences", "heldout_len"})
"""Options of the rooms below that all points have in common."""


@dataclass(frozen=True)
class Cut:
    """An output folder to be made."""

    job: Job
    folder: Path
    beside: tuple[Path, ...]
    """Folders whose stages it takes where they would come out the same."""
    turn: int
    """It is made after those of a lower one."""


def tried_options() -> list[Field]:
    """The options that a way to cut may set."""
    fields = [field for kind in (Pruning, Calibration, Recovery) for field in fields_of(kind)]
    return [field for field in fields if field.name not in _JUDGING and field.type != tuple[str, ...]]


def job_in(base: Job, way: Way) -> Job:
    """The job with the options of a way; raises NirvanaError for what cannot be judged beside the others."""
    options = dict(way.options)
    if not options:
        return base
    own = base.options()
    if "preset" in options:
        tried = {field.name for field in tried_options()}  # what judges stays as the search has it
        for name in {name for preset in PRESETS.values() for name in preset} & tried:
            own.pop(name)
    job = job_of(base.model, {**own, **options})
    if job.calibration != base.calibration and not base.calibration.eval_text:  # a preset names text, too
        raise NirvanaError(
            f"--try {way.name} calibrates on other text, and each cut would be judged on what its own "
            "text holds back.",
            hint="Name a text that judges all of them: --eval-text FILE",
        )
    return job


def cuts_of(
    out: Path, base: Job, points: Sequence[Point], missing: Iterable[Point], first: Point
) -> list[Cut]:
    """What is to be made for ``missing`` ones of the cut ``points``, ``first`` before all others.

    The first cut of each way serves those of the same way; those of the job's own way serve the same
    sparsity of the others. The dense model is quantized and judged beside the first cut alone.
    """
    firsts: dict[Way, Point] = {}
    for point in (first, *points):
        firsts.setdefault(point.way, point)
    cuts = {}
    for point in missing:
        sources = [first, firsts[point.way], replace(point, way=OWN)]
        others = dict.fromkeys(one.cut for one in sources if one.cut != point.cut)
        turn = 0 if point.cut == first.cut else 1 if point.way == OWN or point == firsts[point.way] else 2
        cuts[point.cut] = Cut(
            _job_at(job_in(base, point.way), point.sparsity, judges_dense=point.cut == first.cut),
            out / point.cut,
            tuple(out / name for name in others),
            turn,
        )
    return sorted(cuts.values(), key=lambda cut: cut.turn)


def _job_at(job: Job, sparsity: float, *, judges_dense: bool) -> Job:
    return replace(
        job,
        pruning=replace(job.pruning, sparsity=sparsity),
        quantization=replace(job.quantization, baseline_quantized=judges_dense),
        measurement=replace(job.measurement, run_benchmark=False),
    )


def make_cuts(
    cuts: Sequence[Cut], where: Where, progress: Progress, *, anew: bool = False
) -> Iterator[tuple[Cut, NirvanaError | None]]:
    """Make the folders, turn by turn; yields each when it is through, with why it was not finished, if so.

    ``anew`` makes them again where an earlier search left them, and takes nothing from what it left.
    """
    made: set[Path] = set()
    here = where.processes == 1 and where.cluster is None
    work = _Worker(progress if here else SILENT, Path.cwd(), anew)
    tally = Tally(len(cuts), where.processes if where.cluster is None else None)
    with progress.task(f"{len(cuts)} cuts", len(cuts)) as advance:
        for turn in sorted({cut.turn for cut in cuts}):
            now = [cut for cut in cuts if cut.turn == turn]
            if anew:
                now = [replace(cut, beside=tuple(one for one in cut.beside if one in made)) for cut in now]
            tally.begin(len(now))
            for cut, result in run_points(now, work, where):
                failure = result if isinstance(result, NirvanaError) else None
                said = "is made." if failure is None else f"failed: {failure.message}"
                progress.note(f"{cut.folder.name} {said} {tally.ended(failed=failure is not None)}")
                if failure is None or isinstance(failure, VerificationError):
                    made.add(cut.folder)
                advance(1)
                yield cut, failure


@dataclass(frozen=True)
class _Worker:
    """Makes one cut; one that misses a required quality is a point all the same."""

    progress: Progress
    here: Path
    """Where the search was begun: the user's paths may be relative to it."""
    anew: bool
    """Whether what an earlier search left is made again."""

    def __call__(self, cut: Cut) -> None:
        with chdir(self.here), self.progress.within(cut.folder.name), suppress(QualityError):
            run_job(
                cut.job,
                out=cut.folder,
                until="quality",
                resume=(cut.folder / MANIFEST).is_file() and not self.anew,
                force=self.anew,
                beside=[folder for folder in cut.beside if (folder / MANIFEST).is_file()],
                progress=self.progress,
            )
