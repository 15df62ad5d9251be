"""Names in a foreign graph are names: none of them becomes a place on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from builders.tiny import write_tiny

from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.quantize.folder import quantize_onnx
from nirvana_deploy.quantize.recipe import Quantization


def test_an_initializer_named_like_a_path_writes_nothing_there(tmp_path: Path) -> None:
    dense = Checkpoint.open(write_tiny(tmp_path / "dense", "llama-tied"))
    folder = onnx_from_checkpoint(dense, tmp_path / "onnx").path
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    linear = next(node for node in model.graph.node if node.op_type == "MatMul")
    old = linear.input[1]
    victim = str(tmp_path / "victim" / "x")
    (tmp_path / "victim").mkdir()
    for tensor in model.graph.initializer:
        tensor.name = victim if tensor.name == old else tensor.name
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = victim
    onnx.save(model, folder / "model.onnx")
    windows = np.random.default_rng(0).integers(0, dense.shape.vocab_size, (4, 8))
    quantize_onnx(folder, tmp_path / "w4", Quantization(scheme="w4", rounding="gptq"), calibration=windows)
    assert not list((tmp_path / "victim").iterdir())
