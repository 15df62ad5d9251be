"""Curves of another run, not measured again: they serve every sparsity of one model and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.recipe import names_of
from nirvana_deploy.calibrate.recipe import Calibration
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import CURVES_FILE, MANIFEST
from nirvana_deploy.output.run import Run
from nirvana_deploy.pipeline.before import by_curves
from nirvana_deploy.pipeline.job import Job
from nirvana_deploy.prune.choosing.choices import Choices
from nirvana_deploy.prune.curves.curve import read_curves
from nirvana_deploy.prune.curves.facts import model_facts, require_curves_of

_DRAWING = {
    "calib": "--calib",
    "num_sequences": "--num-sequences",
    "seq_len": "--seq-len",
    "seed": "--seed",
}
"""Options that decide the windows."""


@dataclass(frozen=True)
class GivenCurves:
    """A file of curves."""

    file: Path
    folder: Path | None
    """The output folder that it lies in; None for a file elsewhere."""

    @classmethod
    def at(cls, path: Path) -> GivenCurves:
        """Of a file, or of an output folder that has one.

        Raises NirvanaError where there are none, and for a folder that chose its text among several.
        """
        file = path / CURVES_FILE if path.is_dir() else path
        if not file.is_file():
            raise NirvanaError(
                f"--curves {path}: {file} does not exist.",
                hint="Pass a folder that 'nirvana-deploy prune' or 'prune-export' made with --preset best.",
            )
        folder = file.parent if file.name == CURVES_FILE and (file.parent / MANIFEST).is_file() else None
        given = cls(file, folder)
        if folder is not None and not Run.open(folder).finished(stage.CURVES):
            raise NirvanaError(
                f"--curves {path}: the stage 'curves' of {folder} is not finished, or another stage chose "
                "among several texts or saliencies, each with curves of its own.",
                hint="Measure curves on one text: --calib with a single source or a mixture with shares.",
            )
        return given

    def calibrated_alike(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` with the calibration of the folder, where they leave it open.

        Raises NirvanaError for an option that draws other windows.
        """
        if self.folder is None:
            return dict(options)
        recorded = Run.open(self.folder).manifest["options"]
        for name, flag in _DRAWING.items():
            if name in options and options[name] != recorded[name]:
                raise NirvanaError(
                    f"{flag} {options[name]} draws other windows than those that the curves of "
                    f"{self.folder} were measured on, with {flag} {recorded[name]}.",
                    hint=f"Leave {flag} out, or --curves.",
                )
        kept = {name: recorded[name] for name in names_of(Calibration) if recorded.get(name) is not None}
        return {**kept, **options}

    def require_serves(self, job: Job, choices: Choices, dense: Checkpoint) -> None:
        """Raise NirvanaError for a job that reads no curves, or several, and for curves of another model."""
        if not by_curves(job, choices):
            raise NirvanaError(
                f"--curves {self.file}: a cut with --saliency {job.pruning.saliency} and --allocation "
                f"{job.pruning.allocation} reads none.",
                hint="Pass --allocation curves, or leave --curves out.",
            )
        if not choices.single:
            raise NirvanaError(
                f"--curves {self.file} are of one calibration text, and this job chooses among several "
                "candidates.",
                hint="Name one --calib, --saliency and --gamma, or leave --curves out.",
            )
        require_curves_of(
            read_curves(self.file),
            model_facts(dense),
            self.file,
            hint="Pass the curves of this model, or leave --curves out: they are measured then.",
        )
