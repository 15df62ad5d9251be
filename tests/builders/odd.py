"""Checkpoints as strangers leave them, with edited configs and weights, and their logits in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from builders.tiny import VOCABULARY
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder

CLOSE = 1e-4
"""How far logits may lie from transformers', relative to the largest one."""
IDS = np.random.default_rng(0).integers(3, VOCABULARY, (1, 40))


def edit(folder: Path, *drop: str, file: str = "config.json", **changed: Any) -> Path:
    """Change keys of a JSON file of ``folder``, and drop some."""
    path = folder / file
    config = json.loads(path.read_text()) if path.exists() else {}
    kept = {key: value for key, value in config.items() if key not in drop}
    path.write_text(json.dumps(kept | changed))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the tensors of ``folder`` by ``change``, in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def torch_logits(folder: Path, ids: NDArray[np.int64] = IDS) -> NDArray[np.float32]:
    """What transformers alone computes from ``folder``: logits [N, T, V]."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=True
    ).eval()
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids)).logits.numpy()
    return logits


def onnx_logits(folder: Path, out: Path, ids: NDArray[np.int64] = IDS, **options: Any) -> NDArray[np.float32]:
    """Logits [N, T, V] of the graph that ``folder`` is exported to."""
    onnx_from_checkpoint(Checkpoint.open(folder), out, **options)
    with OrtDecoder(out, threads=1) as runner:
        return runner.prefill(ids)[0]


def far(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The largest difference, relative to the largest number."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
