"""Which model of an output folder is meant where a command runs one."""

from __future__ import annotations

from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.output.layout import holds_model
from nirvana_deploy.output.records import read_records
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.variants import PRUNED, ModelVariant, variants_of
from nirvana_deploy.report.verdict import verdict


def chosen_variant(
    path: Path, variant: str | None, *, doing: str = "Running", progress: Progress = SILENT
) -> ModelVariant:
    """The variant so called, else the one that the report recommends, else the pruned one in float.

    ``progress`` hears what was taken where nothing was asked for; ``doing`` begins that sentence. Raises
    NirvanaError for an output folder without ONNX model, and for a variant that it does not have.
    """
    with Run.open(path) as run:
        found = {one.name: one for one in variants_of(run) if holds_model(path / one.folder)}
    if not found:
        raise NirvanaError(
            f"{path} has no ONNX model yet.",
            hint="Export it first: repeat its prune command as prune-export, with --resume.",
        )
    if variant is None:
        recommended = verdict(read_records(path)).recommended
        variant = next((name for name in (recommended, PRUNED) if name in found), next(iter(found)))
        why = "as its report recommends" if variant == recommended else "as its report recommends none"
        others = f"; --variant names another: {', '.join(found)}" if len(found) > 1 else ""
        progress.note(f"{doing} {variant}, {why}{others}.")
    return look_up(variant, found, what="variant", hint=f"nirvana-deploy inspect {path}")


def refuse_variant(path: Path, variant: str | None) -> None:
    """Raise NirvanaError where ``variant`` is asked of what is one model."""
    if variant is not None:
        raise NirvanaError(
            f"{path} is one model, not an output folder.",
            hint="Leave --variant out, or name its output folder.",
        )
