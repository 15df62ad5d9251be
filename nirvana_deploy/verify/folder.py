"""Check at any time what was made: an output folder, or one ONNX folder that stands alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError, VerificationError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.shown.html import html_table
from nirvana_deploy.model.checkpoint import config_json
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import CHECKPOINT, MANIFEST, PLAN_FILE, holds_model, is_speculative
from nirvana_deploy.output.promise import incomplete, unlisted
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.variants import DENSE, PRUNED, variant_named, variants_of
from nirvana_deploy.prune.plan import check_plan_was_cut
from nirvana_deploy.prune.plan_file import read_plan
from nirvana_deploy.quantize.coverage import Coverage, recorded_coverage
from nirvana_deploy.quantize.graph.linears import RECORD_FILE
from nirvana_deploy.runtime.openvino.ir import refuse_ir
from nirvana_deploy.verify.against_torch import verify_onnx
from nirvana_deploy.verify.folder_check import check_folder
from nirvana_deploy.verify.report import VerifyReport
from nirvana_deploy.verify.speculative import verify_speculative
from nirvana_deploy.verify.stage import compare_in

ALONE = "model"
"""What an ONNX folder outside any output folder is called."""
DRAFTED = "drafted"
"""What a model with its draft is called."""


@dataclass(frozen=True)
class FolderCheck:
    """What :func:`verify_folder` found."""

    out: Path
    damaged: list[str]
    """Files that are missing or whose sha256 differs from the manifest's."""
    reports: dict[str, VerifyReport]
    """ONNX against checkpoint, by variant."""
    compared: dict[str, VerifyReport] = field(default_factory=dict)
    """A runtime that was named against ONNX Runtime on the CPU, by the path of what it ran."""
    quantized: dict[str, Coverage] = field(default_factory=dict)
    """What runs in integer kernels now, by variant; half precision runs in none on the CPU."""
    incomplete: str | None = None
    """What the folder lacks of what its manifest promises, as a sentence."""
    unlisted: list[str] = field(default_factory=list)
    """Files under the names of a run that the manifest does not list."""

    @property
    def passed(self) -> bool:
        """Whether :meth:`require_passed` would raise nothing."""
        try:
            self.require_passed()
        except VerificationError:
            return False
        return True

    def __repr__(self) -> str:
        names = ", ".join([*self.reports, *self.quantized, *self.compared])
        word = "passed" if self.passed else "FAILED"
        return f"FolderCheck({str(self.out)!r}, {word}: {names or 'no model'})"

    def _repr_html_(self) -> str:
        """The comparisons, for a notebook."""
        rows = [
            (name, check.name, f"{check.max_abs_diff:.1e}", f"{check.tolerance:.1e}", check.passed)
            for name, report in {**self.reports, **self.compared}.items()
            for check in report.checks
        ]
        headers = ["Model", "Check", "Largest difference", "Allowed", "Passed"]
        return html_table(headers, rows, title=repr(self), note=self.incomplete or "")

    def require_passed(self) -> None:
        """Raise VerificationError unless every file, record and comparison is as it should be."""
        if self.damaged:
            more = f" and {len(self.damaged) - 3} more" if len(self.damaged) > 3 else ""
            raise VerificationError(
                f"{self.out} is not as its manifest says; missing or different: "
                f"{', '.join(self.damaged[:3])}{more}.",
                hint="Make them again: repeat the prune-export command with --resume.",
            )
        for name, report in self.reports.items():
            if name == DRAFTED:
                report.require_passed(self.out, against="its target alone")
            report.require_passed(_folder(self.out, name), of_input=name != PRUNED)
        for name, coverage in self.quantized.items():
            coverage.require_whole(_folder(self.out, name))
        for name, report in self.compared.items():
            runtime = report.greedy[0].runtime
            report.require_passed(self.out / name, against=f"ONNX Runtime on the CPU ({runtime} differs)")
        if self.incomplete is not None:
            raise VerificationError(
                self.incomplete, hint="Complete it: repeat the prune-export command with --resume."
            )
        if self.unlisted:
            more = f" and {len(self.unlisted) - 3} more" if len(self.unlisted) > 3 else ""
            raise VerificationError(
                f"{self.out} holds files that its manifest does not list: "
                f"{', '.join(self.unlisted[:3])}{more}.",
                hint="Nothing vouches for them: move them away.",
            )


def verify_folder(
    out: Path | str, *, threads: int | None = None, runtime: str | None = None, progress: Progress = SILENT
) -> FolderCheck:
    """Check an output folder: files and records against its manifest, then ONNX against checkpoint.

    Of a model packaged with its draft, whether greedy answers are the model's own. Changes nothing.
    ``runtime`` also runs the models there, and compares it with ONNX Runtime on the CPU.
    """
    out = Path(out)
    if is_speculative(out):
        return FolderCheck(out, damaged=[], reports={DRAFTED: _drafted(out, threads, runtime, progress)})
    _require_output_folder(out)
    run = Run.open(out, progress=progress)
    damaged, missing, more = run.damaged(), incomplete(run), unlisted(run)
    checkpoints = {PRUNED: out / CHECKPOINT, DENSE: run.dense}
    if not damaged and run.has(stage.PLAN) and run.has(stage.CHECKPOINT):
        check_plan_was_cut(read_plan(out / PLAN_FILE), shape_from_config(config_json(out / CHECKPOINT)))
    # first: where the runtime or its device is missing, that is said before minutes of work
    compared = compare_in(run, runtime, threads=threads) if runtime is not None and not damaged else {}
    reports = {
        name: verify_onnx(checkpoint, out / variant_named(name).folder, threads=threads, progress=progress)
        for name, checkpoint in checkpoints.items()
        if checkpoint.is_dir() and run.has(variant_named(name).stage) and not damaged
    }
    quantized = {
        variant.name: _quantized_check(out / variant.folder, checkpoints[DENSE if variant.dense else PRUNED])
        for variant in variants_of(run)
        if variant.scheme is not None and not damaged
    }
    return FolderCheck(
        out=out,
        damaged=damaged,
        reports=reports,
        compared=compared,
        quantized=quantized,
        incomplete=missing,
        unlisted=more,
    )


def verify_onnx_folder(
    folder: Path | str, *, model: str, threads: int | None = None, progress: Progress = SILENT
) -> FolderCheck:
    """Check an ONNX folder that stands alone against the checkpoint ``model``; changes nothing."""
    folder = Path(folder)
    source = resolve_model(model, progress=progress)
    if (folder / RECORD_FILE).is_file():
        coverage = _quantized_check(folder, source.path)
        return FolderCheck(out=folder, damaged=[], reports={}, quantized={ALONE: coverage})
    report = verify_onnx(source.path, folder, threads=threads, progress=progress)
    return FolderCheck(out=folder, damaged=[], reports={ALONE: report})


def _drafted(out: Path, threads: int | None, runtime: str | None, progress: Progress) -> VerifyReport:
    if runtime is not None:
        raise NirvanaError(
            f"{out} runs in onnxruntime-genai alone: it holds a model and its draft.",
            hint="Leave out --runtime.",
        )
    return verify_speculative(out, threads=threads, progress=progress)


def _folder(out: Path, name: str) -> Path:
    """Where a variant lies; ``out`` itself for a folder that stands alone."""
    return out if name in (ALONE, DRAFTED) else out / variant_named(name).folder


def _quantized_check(folder: Path, checkpoint: Path) -> Coverage:
    if checkpoint.is_dir():
        check_folder(folder, checkpoint)
    return recorded_coverage(folder)


def _require_output_folder(out: Path) -> None:
    """Raise NirvanaError for a part of an output folder, or one of its kinds alone: with what to type."""
    if (out / MANIFEST).is_file():
        return
    for around in list(out.resolve().parents)[:2]:
        if (around / MANIFEST).is_file():
            raise NirvanaError(
                f"{out} is a part of the output folder {around}, whose manifest knows its files.",
                hint=f"nirvana-deploy verify {around}",
            )
    refuse_ir(out)
    if holds_model(out):
        raise NirvanaError(
            f"{out} is an ONNX folder alone: nothing in it says what it was exported from.",
            hint=f"nirvana-deploy verify {out} --checkpoint CHECKPOINT",
        )
    if (out / "config.json").is_file():
        raise NirvanaError(
            f"{out} is a checkpoint alone: it is what an ONNX folder is compared with.",
            hint=f"nirvana-deploy verify ONNX_FOLDER --checkpoint {out}",
        )
