"""Code on a model card: the folder, downloaded, in the programs that take it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nirvana_deploy.base.reading import read_json
from nirvana_deploy.output.layout import MODEL_FILE, is_seq2seq
from nirvana_deploy.report.snippets import RUN_GENAI, RUN_SEQ2SEQ, RUN_TRANSFORMERS, SEQ2SEQ_CLASS, Snippet

FOLDER = "path/to/this/folder"
_OPENVINO = """\
import numpy as np
import openvino as ov
from transformers import AutoTokenizer

folder = "FOLDER"
ids = AutoTokenizer.from_pretrained(folder)("The capital of France is", return_tensors="np")["input_ids"]
model = ov.Core().compile_model(f"{folder}/model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
names = {tensor.any_name for tensor in model.inputs}
feeds = {name: value for name, value in feeds.items() if name in names}
for tensor in model.inputs:
    if "past_key_values" in tensor.any_name:
        _, heads, _, width = (None if one.is_dynamic else one.get_length() for one in tensor.partial_shape)
        feeds[tensor.any_name] = np.zeros((1, heads, 0, width), TYPE)
print(model(feeds)["logits"][0, -1].argmax())"""
_OPENVINO_GENAI = """\
import openvino_genai

pipeline = openvino_genai.LLMPipeline("FOLDER", "CPU")
print(pipeline.generate("The capital of France is", max_new_tokens=32))"""
_NUMPY_TYPES = {"fp32": "np.float32", "fp16": "np.float16"}


def checkpoint_snippets(folder: Path, *, encoder_decoder: bool) -> tuple[Snippet, ...]:
    """How to run a checkpoint folder in transformers."""
    code = RUN_TRANSFORMERS.replace('"checkpoint"', f'"{FOLDER}"')
    if encoder_decoder:
        code = code.replace("AutoModelForCausalLM", SEQ2SEQ_CLASS)
    if not (folder / "modeling_nirvana.py").is_file():  # a stock model
        code = code.replace("(\n    folder, trust_remote_code=True\n)", "(folder)")
    return (Snippet("Generate with transformers", "python", code),)


def onnx_snippets(folder: Path, *, dtype: str | None) -> tuple[Snippet, ...]:
    """How to run an ONNX folder in the programs that take it."""
    return tuple(_onnx_snippets(folder, dtype))


def _onnx_snippets(folder: Path, dtype: str | None) -> Iterator[Snippet]:
    if is_seq2seq(folder):
        yield Snippet("Generate with ONNX Runtime", "python", RUN_SEQ2SEQ.replace("FOLDER", FOLDER))
        return
    if (folder / "genai_config.json").is_file():
        code = RUN_GENAI.replace("FOLDER", FOLDER)
        yield Snippet("Generate with onnxruntime-genai, 0.15 or newer", "python", code)
    cached = (folder / MODEL_FILE).is_file() and (folder / "genai_config.json").is_file()
    if cached and dtype in _NUMPY_TYPES and not looks_up_codes(folder):
        code = _OPENVINO.replace("FOLDER", FOLDER).replace("TYPE", _NUMPY_TYPES[dtype])
        yield Snippet("The next token with OpenVINO", "python", code)


def openvino_snippets() -> tuple[Snippet, ...]:
    """How to run a folder of ``package --openvino``."""
    return (Snippet("Generate with openvino-genai", "python", _OPENVINO_GENAI.replace("FOLDER", FOLDER)),)


def draft_snippets() -> tuple[Snippet, ...]:
    """How to run a folder of ``package --speculative``."""
    code = RUN_GENAI.replace("FOLDER", FOLDER)
    return (Snippet("Generate with onnxruntime-genai, 0.18 or newer", "python", code),)


def looks_up_codes(folder: Path) -> bool:
    """Whether the embedding of an ONNX folder is stored in codes, which OpenVINO does not look up."""
    record = folder / "quantization.json"
    weights: Any = read_json(record).get("weights") if record.is_file() else None
    return bool(weights and weights.get("head") and weights.get("writing") == "ort")
