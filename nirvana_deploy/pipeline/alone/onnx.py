"""ONNX folders that stand alone: exported from a checkpoint, quantized from one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nirvana_deploy.base.ownership.held import held
from nirvana_deploy.base.ownership.marker import require_apart
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.calibrate.mixture import files_of
from nirvana_deploy.calibrate.windows import calibration_data
from nirvana_deploy.calibrate.windows_file import read_windows
from nirvana_deploy.export.onnx_export import OnnxFolder, onnx_from_checkpoint
from nirvana_deploy.export.recipe import Graph
from nirvana_deploy.model.checkpoint import Checkpoint, load_tokenizer, model_record
from nirvana_deploy.model.reading import require_known_tokens
from nirvana_deploy.model.sources import local_paths, resolve_model
from nirvana_deploy.output.layout import CALIBRATION_FILE
from nirvana_deploy.quantize.folder import QuantizedFolder, quantize_onnx
from nirvana_deploy.quantize.graph.linears import open_folder
from nirvana_deploy.quantize.recipe import CalibrationText, Quantization
from nirvana_deploy.report.cards.folders import card_alone, write_card
from nirvana_deploy.report.cards.packages import source_of_alone
from nirvana_deploy.report.sensitivity import write_sensitivity

_HELDOUT_WINDOWS = 8


def export_onnx(
    model: str,
    out: Path | str,
    graph: Graph | None = None,
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> OnnxFolder:
    """Export a checkpoint folder, dense or pruned, an alias or a hub id to the ONNX folder ``out``.

    The folder appears whole. Raises NirvanaError when ``out`` is there and not ours, or without ``force``,
    and for a model that cannot be exported as ``graph`` says.
    """
    graph, out = graph or Graph(), Path(out)
    with held(out, force=force, reads=local_paths(model)):
        source = resolve_model(model, progress=progress)
        require_apart(out, reads=[source.path])
        exported = onnx_from_checkpoint(
            Checkpoint.open(source.path),
            out,
            dtype=graph.dtype,
            flavor=graph.flavor,
            cache_tokens=graph.cache_tokens,
            last_logits=graph.last_logits,
            progress=progress,
        )
        write_card(out, card_alone(out, model=model_record(source), dtype=graph.dtype), progress=progress)
    return exported


def quantize_onnx_folder(
    folder: Path | str,
    out: Path | str,
    recipe: Quantization,
    text: CalibrationText | None = None,
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> QuantizedFolder:
    """Quantize the float ONNX ``folder`` into ``out``, calibrated on ``text`` if any.

    Raises NirvanaError when ``out`` is there and not ours or ``force`` is not given; both as
    :func:`quantize_onnx` does, which also raises VerificationError.
    """
    folder, out, text = Path(folder), Path(out), text or CalibrationText()
    with held(out, force=force, reads=[folder, *files_of(text.calib or "")]):
        windows = {} if text.calib is None else _drawn(folder, text, progress)
        quantized = quantize_onnx(folder, out, recipe, progress=progress, **windows)
        write_sensitivity(out, quantized.record)
        write_card(out, card_alone(out, model=source_of_alone(folder)), progress=progress)
    return quantized


def _drawn(folder: Path, text: CalibrationText, progress: Progress) -> dict[str, Any]:
    """Calibration and held-out windows of a text by the folder's tokenizer; those of a job as they are."""
    open_folder(folder)  # what cannot be quantized is refused before any text is read
    tokenizer, path = load_tokenizer(folder), Path(text.calib or "")
    if path.name == CALIBRATION_FILE:
        windows = read_windows(path)["calibration"]
        require_known_tokens(windows, len(tokenizer))
        return {"calibration": windows}
    data = calibration_data(
        text.calib or "",
        tokenizer,
        num_sequences=text.num_sequences,
        seq_len=text.seq_len,
        seed=text.seed,
        heldout_sequences=_HELDOUT_WINDOWS,
        heldout_len=max(text.seq_len, 2),
        progress=progress,
    )
    return {"calibration": data.calibration.tokens, "heldout": data.heldout.tokens}
