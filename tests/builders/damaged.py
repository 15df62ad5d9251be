"""ONNX folders with one thing wrong."""

from __future__ import annotations

from pathlib import Path

import onnx


def damaged_copy(folder: Path, out: Path, initializer: str) -> Path:
    """The ONNX folder with one weight tensor negated."""
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == initializer:
            tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    out.mkdir()
    for file in folder.iterdir():
        if not file.name.startswith("model.onnx"):
            (out / file.name).write_bytes(file.read_bytes())
    onnx.save(
        model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256
    )
    return out
