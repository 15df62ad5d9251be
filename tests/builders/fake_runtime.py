"""A runtime that is one row of the table: ONNX Runtime on the CPU under another name."""

from __future__ import annotations

from pathlib import Path

from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.table import Runtime

ROW = Runtime("fake", takes="onnx", opens=f"{__name__}:open_fake", module="onnxruntime", device="cpu")


def open_fake(path: Path, *, runtime: str, threads: int | None) -> OrtDecoder:
    """An OrtDecoder that says it is ``runtime``."""
    decoder = OrtDecoder(path, threads=threads)
    decoder.runtime = runtime
    return decoder
