"""An OpenVINO model with its tokenizer, for openvino-genai's ``LLMPipeline`` and the programs built on it.

The model is the ONNX graph with the KV cache kept inside (``runtime/openvino/stateful.py``), its float32
weights stored as float16; tokenizer and detokenizer are models too, made by openvino-tokenizers.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import files_under, whole_folder, write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.resources import require_free_bytes
from nirvana_deploy.model.text.source_card import legal_files
from nirvana_deploy.model.text.stops import GENERATION_CONFIG, stop_ids
from nirvana_deploy.model.text.tokenizer import tokenizer_in
from nirvana_deploy.output.layout import IR_FILE
from nirvana_deploy.runtime.openvino.installed import openvino_module
from nirvana_deploy.runtime.openvino.session import read_portable
from nirvana_deploy.runtime.openvino.stateful import keep_cache_inside

TOKENIZER, DETOKENIZER = (f"openvino_{name}.xml" for name in ("tokenizer", "detokenizer"))
"""As openvino-genai looks for them; each has its weights beside it, ``.bin``."""
_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class OpenVinoFolder:
    """A written folder."""

    path: Path
    size_bytes: int


def openvino_from_onnx(onnx_folder: Path, out: Path, *, progress: Progress = SILENT) -> OpenVinoFolder:
    """Write a decoder's ONNX folder as the folder ``out``, which appears whole or not at all.

    Raises NirvanaError as :func:`read_portable` does, for a folder without a tokenizer or with one that
    OpenVINO has no operators for, and a disk without room; MissingExtraError without OpenVINO's packages.
    """
    openvino = openvino_module()
    tokenizers = openvino_module("openvino_tokenizers", what_for="A tokenizer for OpenVINO")
    if not (onnx_folder / "tokenizer.json").is_file():
        raise NirvanaError(
            f"{onnx_folder} has no tokenizer.json, which openvino-genai's tokenizer is made of.",
            hint="Export it again from a checkpoint with a tokenizer: nirvana-deploy export CHECKPOINT "
            f"--out {onnx_folder} --force",
        )
    model = read_portable(onnx_folder)
    require_free_bytes(out, sum(file.stat().st_size for file in files_under(onnx_folder)), what="The model")
    with progress.task("Writing OpenVINO", 2) as advance, whole_folder(out) as folder:
        keep_cache_inside(model)
        openvino.save_model(model, folder / IR_FILE, compress_to_fp16=True)
        advance(1)
        try:
            made = tokenizers.convert_tokenizer(tokenizer_in(onnx_folder), with_detokenizer=True)
        except (RuntimeError, ValueError, TypeError) as error:
            raise NirvanaError(
                f"openvino-tokenizers cannot convert the tokenizer in {onnx_folder}: {error}.",
                hint="Run the ONNX folder as it is: nirvana-deploy generate "
                f"{onnx_folder} --runtime openvino-cpu",
            ) from error
        for converted, name in zip(made, (TOKENIZER, DETOKENIZER), strict=True):
            openvino.save_model(converted, folder / name)
        for file in (*(onnx_folder / name for name in _COPIED), *legal_files(onnx_folder)):
            if file.is_file():
                shutil.copy(file, folder)
        if settings := _generation_settings(onnx_folder):
            write_json(folder / GENERATION_CONFIG, settings)
        advance(1)
    return OpenVinoFolder(out, sum(file.stat().st_size for file in files_under(out)))


def _generation_settings(onnx_folder: Path) -> dict[str, Any]:
    """What openvino-genai takes stop ids from: generation_config.json, with those that any file names."""
    own = onnx_folder / GENERATION_CONFIG
    settings = read_json(own, dict[str, Any]) if own.is_file() else {}
    if stops := stop_ids(onnx_folder):
        settings["eos_token_id"] = list(stops) if len(stops) > 1 else stops[0]
    return settings
