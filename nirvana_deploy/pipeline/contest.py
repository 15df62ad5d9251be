"""Models of any kind against each other: the paths that a user names become contenders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nirvana_deploy import __version__
from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.held import held
from nirvana_deploy.base.ownership.marker import TOOL
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.registry import look_up, nearest_names
from nirvana_deploy.base.shown.html import Record, html_table
from nirvana_deploy.measure.benchmark import SCHEMA
from nirvana_deploy.measure.contest.contender import (
    Contender,
    require_model,
    require_runtime,
    runtime_of,
)
from nirvana_deploy.measure.contest.same_model import facts_of, require_same_model
from nirvana_deploy.measure.contest.timing import require_rounds, time_contenders
from nirvana_deploy.measure.recipe import Traffic, Workload
from nirvana_deploy.measure.rounds.watch import wait_until_idle
from nirvana_deploy.measure.workloads.session import measure_sweep, measure_workload
from nirvana_deploy.output.kinds.workloads import TrafficContestRecord
from nirvana_deploy.output.layout import MANIFEST
from nirvana_deploy.output.record_kinds import ContestRecord
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.undamaged import require_undamaged
from nirvana_deploy.pipeline.compare import labels
from nirvana_deploy.pipeline.traffic import Asked, require_context, require_served, traffic_asked
from nirvana_deploy.report.compare.contest_table import contest_table
from nirvana_deploy.report.pages.workloads import workloads_table
from nirvana_deploy.runtime.beside import context_tokens
from nirvana_deploy.runtime.models import models_for
from nirvana_deploy.runtime.table import runtime_named


class Named(NamedTuple):
    """What a user typed: a path, and which models of it where it is an output folder."""

    path: Path
    variants: tuple[str, ...]
    """None of them named: all."""


def benchmark_contenders(
    contenders: Sequence[Path | str],
    workload: Workload | None = None,
    *,
    asked: Traffic | None = None,
    runtime: str | None = None,
    out: Path | str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Record:
    """Time models of any kind against the first of them, in rounds in turn; returns a ContestRecord.

    With workloads or sweeps in ``asked`` they are timed under these, as ``benchmark_workloads`` does, and it
    returns a TrafficContestRecord; then an error is raised where all contenders fail.

    Each of ``contenders`` is an output folder, whose models all take part, ``OUT:VARIANT`` for one of them
    (or several, separated by commas), an ONNX folder, a checkpoint folder, an engine or a GGUF file. One
    that stands twice is an A/A test. ``runtime`` runs those that it takes. ``out`` is written with the
    result. A contender that fails is in ``failed``, and raises nothing.

    Raises NirvanaError for a path that is nothing to time, a file that was changed since its manifest, a
    runtime that is not installed, models that are not the same, fewer than two rounds, and an ``out`` that
    is not ours, or there without ``force``; under a workload also for an unknown name, lengths beyond a
    contender's context, and one that no server takes where the workload asks servers.
    """
    workload, out = workload or Workload(), None if out is None else Path(out)
    asked = asked or Traffic()
    if not asked.workloads:
        require_rounds(workload)
    names = [named(one) for one in contenders]
    if not names:
        raise NirvanaError("Nothing to time.", hint="nirvana-deploy benchmark OUT OTHER ...")
    if out is None:
        return _timed(names, asked, workload, runtime, lambda record: None, progress)
    with held(out, force=force, reads=[one.path for one in names], wrote=_wrote):
        return _timed(names, asked, workload, runtime, partial(write_json, out), progress)


def is_one_output_folder(paths: Sequence[Path]) -> bool:
    """Whether the models of one output folder are timed against each other, and its records written."""
    return len(paths) == 1 and (paths[0] / MANIFEST).is_file()


def named(typed: Path | str) -> Named:
    """A path, and the variants behind its last colon, unless such a path is there.

    Raises NirvanaError for a path that does not exist, and for variants of what is no output folder.
    """
    path = Path(typed)
    if path.exists():
        return Named(path, ())
    before, colon, behind = str(typed).rpartition(":")
    if not colon or not Path(before).exists():
        raise NirvanaError(f"{typed} does not exist.{_guess(path)}", hint=_KINDS)
    if not (Path(before) / MANIFEST).is_file():
        raise NirvanaError(
            f"{before} is not an output folder, so it has no model called {behind!r}.", hint=f"Name {before}"
        )
    return Named(Path(before), tuple(name.strip() for name in behind.split(",")))


_KINDS = (
    "Name output folders (OUT, or OUT:pruned for one model), ONNX folders, checkpoints, .engine or .gguf."
)


def _guess(path: Path) -> str:
    try:
        beside = [child.name for child in path.parent.iterdir() if not child.name.startswith(".")]
    except OSError:
        return ""
    close = [str(path.with_name(name)) for name in nearest_names(path.name, beside)] if path.name else []
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _timed(
    names: Sequence[Named],
    asked: Traffic,
    workload: Workload,
    runtime: str | None,
    keep: Callable[[Any], None],
    progress: Progress,
) -> Record:
    """Time what ``names`` stand for; ``keep`` is called with the record whenever there is more of it."""
    found = _distinct([one for name in _labelled(names) for one in _contenders(*name, runtime)])
    for one in found:
        require_runtime(one)
    traffic = _traffic(asked, workload, found, names) if asked.workloads or asked.sweeps else None
    for path in dict.fromkeys(one.path for one in found):
        require_undamaged(path, done="timed", progress=progress)
    cautions = require_same_model({one.name: facts_of(one.path) for one in found})
    record: dict[str, Any]
    if traffic is None:
        record = time_contenders(found, workload=workload, cautions=cautions, progress=progress)
        keep(record)
    else:
        record = {"schema": SCHEMA, "tool": f"{TOOL} {__version__}", "cautions": cautions}
        _time_under(traffic, found, workload, record, keep, progress)

    def html() -> str:
        table = contest_table(record) if traffic is None else workloads_table(record)
        return html_table(table.headers, table.rows)

    return Record(record, line=", ".join(one.name for one in found), html=html)


def _traffic(asked: Traffic, workload: Workload, found: Sequence[Contender], names: Sequence[Named]) -> Asked:
    """What is asked for; raises NirvanaError where a contender cannot answer it."""
    again = " ".join(["nirvana-deploy benchmark", *(str(one.path) for one in names)])
    traffic = traffic_asked(asked, workload, again=again)
    told = (context_tokens(one.path) for one in found if one.path.is_dir())
    require_context(traffic, min((one for one in told if one is not None), default=None), again=again)
    require_served(traffic[0], found)
    return traffic


def _time_under(
    traffic: Asked,
    found: Sequence[Contender],
    workload: Workload,
    record: dict[str, Any],
    keep: Callable[[Any], None],
    progress: Progress,
) -> None:
    """Add each workload and sweep to ``record`` when it is measured: a later failure takes none away."""
    workloads, sweeps = traffic
    record |= {"workloads": [], "sweeps": []}
    if workload.wait_until_idle:
        wait_until_idle(max_minutes=workload.max_minutes, progress=progress)
    for one in workloads:
        measured = measure_workload(found, one, threads=workload.threads, progress=progress)
        record["workloads"].append(measured)
        keep(record)
    for sweep in sweeps:
        record["sweeps"].append(measure_sweep(found, sweep, progress=progress))
        keep(record)


def _labelled(names: Sequence[Named]) -> Iterator[tuple[str, Named]]:
    """Each path with as much of it as tells it from the others; the same path has the same label twice.

    A part of an output folder has the folder's label in front.
    """
    places = {one.path.resolve(): _folder_around(one.path.resolve()) for one in names}
    folders = list(dict.fromkeys(places.values()))
    label_of = dict(zip(folders, labels(folders), strict=True))
    for one in names:
        place = one.path.resolve()
        folder = places[place]
        yield (Path(label_of[folder]) / place.relative_to(folder)).as_posix(), one


def _folder_around(place: Path) -> Path:
    """The output folder that a path is, or lies in; the path itself where there is none."""
    around = (place, *place.parents[:2])
    return next((folder for folder in around if (folder / MANIFEST).is_file()), place)


def _contenders(label: str, name: Named, runtime: str | None) -> Iterator[Contender]:
    if not (name.path / MANIFEST).is_file():
        require_model(name.path)
        yield Contender(label, name.path, runtime_of(name.path, runtime))
        return
    run = Run.open(name.path)
    takes_gguf = runtime is not None and runtime_named(runtime).takes == "gguf"
    models = {one.name: path for one, path in models_for(run, None if takes_gguf else runtime).items()}
    if not models:
        raise NirvanaError(
            f"{name.path} has no model to time yet.",
            hint=f"Finish it: nirvana-deploy prune-export --recipe {name.path}/recipe.toml --resume "
            f"--out {name.path}",
        )
    for variant in name.variants or models:
        path = look_up(variant, models, what=f"model of {name.path}")
        yield Contender(f"{label}:{variant}", path, runtime_of(path, runtime))


def _distinct(contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders, with a number behind a name that stands more than once."""
    seen: Counter[str] = Counter()
    found = []
    for one in contenders:
        seen[one.name] += 1
        again = f" ({seen[one.name]})" if seen[one.name] > 1 else ""
        found.append(replace(one, name=one.name + again))
    return found


def _wrote(file: Path) -> bool:
    """Whether a file is the record of a contest."""
    for kind in (ContestRecord, TrafficContestRecord):
        with suppress(NirvanaError):
            record: Any = read_json(file, kind)
            return str(record["tool"]).startswith(f"{TOOL} ")
    return False
