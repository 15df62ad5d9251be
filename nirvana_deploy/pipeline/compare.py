"""Finished output folders side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.held import held
from nirvana_deploy.output.manifest import is_ours
from nirvana_deploy.output.promise import incomplete
from nirvana_deploy.output.records import Records, read_records
from nirvana_deploy.output.run import Run
from nirvana_deploy.report.compare.alike import Folder
from nirvana_deploy.report.compare.comparison import Comparison, compare
from nirvana_deploy.report.compare.page import GENERATOR, comparison_html, comparison_markdown

_HEAD_BYTES = 1000
"""Of a page, within which it says what made it."""


def compare_folders(outs: Sequence[Path | str]) -> Comparison:
    """Set finished output folders side by side, of one model or of several.

    Raises NirvanaError for fewer than two, for one that stands twice, and for one that is not finished, not
    measured, not of this tool or of a later version.
    """
    places = [Path(out).resolve() for out in outs]
    if len(set(places)) < len(places):
        twice = next(out for out, place in zip(outs, places, strict=True) if places.count(place) > 1)
        raise NirvanaError(f"{twice} is named twice.", hint="Name each folder once.")
    if len(places) < 2:
        raise NirvanaError(
            "A comparison takes two folders or more.",
            hint="nirvana-deploy report --compare OUT-1 OUT-2",
        )
    found = [_finished(Path(out)) for out in outs]
    return compare([Folder(name, records) for name, records in zip(labels(places), found, strict=True)])


def write_comparison(found: Comparison, file: Path, *, reads: Sequence[Path], force: bool = False) -> None:
    """Write the page of a comparison: HTML, or Markdown if ``file`` ends in .md; whole or not at all.

    ``reads`` are the folders compared. Raises NirvanaError for a file that is there without ``force``, and
    for one that no comparison wrote.
    """
    write = comparison_markdown if file.suffix == ".md" else comparison_html
    with held(file, force=force, reads=reads, wrote=_wrote):
        write_bytes(file, write(found).encode())


def _wrote(file: Path) -> bool:
    """Whether a file is the page of a comparison."""
    with file.open("rb") as opened:
        return GENERATOR.encode() in opened.read(_HEAD_BYTES)


def _finished(out: Path) -> Records:
    run = Run.open(out)
    if not is_ours(run.manifest):
        raise NirvanaError(
            f"{out / 'manifest.json'} is none of nirvana-deploy: its tool is {run.manifest.get('tool')!r}.",
            hint="Name folders that prune-export made.",
        )
    if (missing := incomplete(run)) is not None:
        again = f"nirvana-deploy prune-export --recipe {out}/recipe.toml --resume --out {out}"
        raise NirvanaError(missing, hint=f"Finish it: {again}")
    records = read_records(out)
    if records.benchmark is None:
        raise NirvanaError(f"{out} was not measured.", hint=f"Measure it: nirvana-deploy benchmark {out}")
    return records


def labels(places: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        labels = [Path(*place.parts[-parts:]).as_posix() for place in places]
        if len(set(labels)) == len(labels):
            break
    return labels
