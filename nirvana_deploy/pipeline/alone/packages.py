"""Packages that people publish: written, then told of on a card of their own and in the report."""

from __future__ import annotations

from pathlib import Path

from nirvana_deploy.base.errors import VerificationError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.output.layout import MANIFEST, ONNX, REPORT_HTML, holds_model
from nirvana_deploy.output.records import read_records
from nirvana_deploy.package import stage as packaging
from nirvana_deploy.package.openvino import OpenVinoFolder
from nirvana_deploy.package.trial import SpeculativePackage
from nirvana_deploy.pipeline.folder import report_folder
from nirvana_deploy.report.cards.folders import card_alone, card_of_package, write_card, write_cards
from nirvana_deploy.report.cards.packages import package_card, source_of_alone


def package_openvino(
    source: Path | str,
    target: Path | str | None = None,
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> OpenVinoFolder:
    """Write the ONNX model of ``source``, an output or an ONNX folder, for openvino-genai, with a card.

    ``target`` None means ``source``/openvino. Raises NirvanaError when there is no ONNX model or it is
    damaged, when ``target`` exists and ``force`` is not given, and for a model that OpenVINO does not run.
    """
    made = packaging.package_openvino(source, target, force=force, progress=progress)
    _tell(Path(source), made.path, progress)
    return made


def package_speculative(
    source: Path | str,
    out: Path | str | None = None,
    *,
    target: str | None = None,
    draft: str | None = None,
    draft_tokens: int | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> SpeculativePackage:
    """Write a model with its draft as one folder for onnxruntime-genai, proved, measured and with a card.

    ``target`` [dense] and ``draft`` [the smallest pruned one] are models of the output folder ``source``, or
    ONNX folders; a ``source`` that is an ONNX folder is the target. ``out`` None: ``source``/speculative.
    ``draft_tokens`` None takes the fastest of 1 to 6. Raises NirvanaError for a model that is not there, a
    pair that does not go together, and an onnxruntime-genai that is missing or too old; VerificationError,
    the folder kept, where the draft changes an answer.
    """
    source, asked = Path(source), packaging.Pairing(target, draft, draft_tokens, threads)
    try:
        made = packaging.speculative_package(source, out, asked, force=force, progress=progress)
    except VerificationError:
        if (source / MANIFEST).is_file():
            _tell_in(source, progress)
        raise
    _tell(source, made.path, progress)
    return made


def benchmark_speculative(
    folder: Path | str, *, new_tokens: int, threads: int | None = None, progress: Progress = SILENT
) -> SpeculativePackage:
    """Measure a folder of :func:`package_speculative` again, and keep the fastest of 1 to 6 draft tokens."""
    made = packaging.benchmark_speculative(folder, new_tokens=new_tokens, threads=threads, progress=progress)
    out = Path(folder).resolve().parent
    if (out / MANIFEST).is_file():
        _tell_in(out, progress)
    return made


def _tell(source: Path, made: Path, progress: Progress) -> None:
    """Write the card of ``made``, and the report of the output folder that it lies in."""
    if not (source / MANIFEST).is_file():
        onnx = source if holds_model(source) else source / ONNX
        write_card(made, package_card(card_alone(onnx, model=source_of_alone(onnx)), made), progress=progress)
    elif made.resolve().is_relative_to(source.resolve()):
        _tell_in(source, progress)
    else:
        write_card(made, card_of_package(source, read_records(source), made), progress=progress)


def _tell_in(out: Path, progress: Progress) -> None:
    """Write the cards of an output folder again, and its report if it has one."""
    if (out / REPORT_HTML).is_file():
        report_folder(out, progress=progress)
    else:
        write_cards(out, progress=progress)
