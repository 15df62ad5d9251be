"""A folder with an OpenVINO model, an IR: openvino-genai runs it, and nothing here does."""

from __future__ import annotations

import re
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.output.layout import IR_FILE, MODEL_FILE, ONNX, is_openvino

_READ = ("10", "11")
"""Versions of the format that OpenVINO 2026.4 reads."""
_VERSION = re.compile(rb"<net\b[^>]*\bversion=\"([^\"]{1,20})\"")
_HEAD_BYTES = 4096


def refuse_ir(path: Path) -> None:
    """Raise NirvanaError where ``path`` is a folder with an OpenVINO model and no ONNX one, or its file."""
    folder = path.parent if path.name == IR_FILE else path
    if not is_openvino(folder):
        return
    version = _version(folder / IR_FILE)
    if version not in _READ:
        raise NirvanaError(
            f"{folder / IR_FILE} is no OpenVINO model of a version that OpenVINO reads: it says "
            f"{version or 'none'}, and {' and '.join(_READ)} are read.",
            hint="Make it again: nirvana-deploy package OUT --openvino",
        )
    beside = folder.parent / ONNX
    onnx = str(beside) if (beside / MODEL_FILE).is_file() else "the ONNX folder that it was made from"
    raise NirvanaError(
        f"{folder} holds an OpenVINO model, which openvino-genai runs; here it is run from ONNX.",
        hint=f"In Python: openvino_genai.LLMPipeline({str(folder)!r}, 'CPU'). Here: name {onnx}.",
    )


def _version(file: Path) -> str | None:
    """What the file says of its version; None where it says nothing."""
    with file.open("rb") as opened:
        found = _VERSION.search(opened.read(_HEAD_BYTES))
    return None if found is None else found[1].decode(errors="replace")
