from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from builders.tiny_t5 import write_t5

from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, config_json
from nirvana_deploy.quantize.graph.layer_runner import Runner
from nirvana_deploy.runtime.onnxruntime.providers import open_on_cpu
from nirvana_deploy.runtime.runner import window_logits
from nirvana_deploy.runtime.torch import open_checkpoint


def test_every_room_starts_an_answer_with_the_same_token(tmp_path: Path) -> None:
    """A decoder whose first token is not 0: torch, the runtime and the quantizer read the same windows."""
    checkpoint = write_t5(tmp_path / "t5", "flan-t5")
    config = config_json(checkpoint) | {"decoder_start_token_id": 7}
    (checkpoint / "config.json").write_text(json.dumps(config))
    onnx_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / "onnx")
    windows = np.random.default_rng(0).integers(3, 200, size=(2, 11))
    expected = window_logits(open_checkpoint(checkpoint), windows)
    runner = open_on_cpu(tmp_path / "onnx", threads=1)
    assert runner.start_token == 7
    np.testing.assert_allclose(window_logits(runner, windows), expected, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(Runner(tmp_path / "onnx").logits(windows), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
