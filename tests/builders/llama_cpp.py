"""llama.cpp for the tests: the prebuilt library of an npm package, driven by a script of node."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from builders.extras import needs
from nirvana_deploy.model.checkpoint import load_checkpoint

VERSION = "3.22.1"
CONSUMER_VERSION = "v0.5.0"
"""llama.cpp's own version inside that package."""
PACKAGES = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/linux-x64@{VERSION}"]

REAL_PROMPTS = [
    "The capital of France is",
    "Once upon a time, in 1984,",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees",
    "Dear Sir or Madam, 12 + 345 =",
]


def installed_llama_cpp(cache: pytest.Cache) -> Path:
    """A folder in pytest's cache with node-llama-cpp in it, installed once; skips where that cannot be."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("llama.cpp is run through its npm package, and node or npm is not installed here")
    folder = cache.mkdir(f"llama.cpp-{VERSION}")
    if not (folder / "ready").is_file():
        (folder / "package.json").write_text('{"private": true}')
        quiet = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--loglevel=error"]
        command = ["npm", "install", *quiet, *PACKAGES]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"npm could not install {PACKAGES[0]}: {done.stderr.strip()[-300:]}")
        (folder / "ready").touch()
    shutil.copyfile(Path(__file__).with_suffix(".mjs"), folder / "llama_cpp.mjs")
    return folder


def run_llama_cpp(folder: Path, jobs: Sequence[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """The answers to ``jobs``: see llama_cpp.mjs. One process for all of them."""
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    command = ["node", "llama_cpp.mjs", str(scratch / "jobs.json"), str(scratch / "answers.json")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answers: list[dict[str, Any]] = json.loads((scratch / "answers.json").read_text())
    return answers


def greedy_share(checkpoint: Path, prompts: Sequence[list[int]], continued: Sequence[list[int]]) -> float:
    """Share of new tokens that are torch's greedy choice after all before them.

    At 1, greedy decoding in torch gives the same tokens: one forward pass proves what generating would.
    """
    return float((greedy_gaps(load_checkpoint(checkpoint), prompts, continued) == 0).mean())


def greedy_gaps(
    model: PreTrainedModel, prompts: Sequence[list[int]], continued: Sequence[list[int]]
) -> NDArray[np.float32]:
    """How far the logit of each new token lies below the largest one, after all tokens before it."""
    gaps = []
    for prompt, new in zip(prompts, continued, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        gaps.append(logits.amax(dim=-1) - logits[torch.arange(len(new)), torch.tensor(new)])
    return np.asarray(torch.cat(gaps))


def in_blocks(model: PreTrainedModel, weight_type: str, *, activations: bool) -> PreTrainedModel:
    """The model with its matrices as a file of ``weight_type`` holds them, and inputs of linears rounded.

    q8_0 or q4_0. Rows of blocks of 32 get 8 or 4 bits and one float16 scale a block, embedding and head 8;
    others are float16. ``activations``: inputs are rounded as llama.cpp does. Changes the model.
    """
    gguf = needs("gguf")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            table = "embed_tokens" in name or "lm_head" in name
            kind = gguf.GGMLQuantizationType["Q8_0" if table else weight_type.upper()]
            if parameter.ndim == 2 and parameter.shape[1] % 32:
                parameter.copy_(parameter.half().float())
            elif parameter.ndim == 2:
                stored = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind)))
    for module in model.modules():
        if activations and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: (_activation_in_q8_0(inputs[0]),))
    return model


def _activation_in_q8_0(x: torch.Tensor) -> torch.Tensor:
    """[..., K] rounded to 8 bits in blocks of 32 along K, where K is a multiple of it; else to float16."""
    if x.shape[-1] % 32:
        return x.half().float()
    blocks = x.unflatten(-1, (-1, 32))
    step = blocks.abs().amax(dim=-1, keepdim=True) / 127
    return (torch.round(blocks / step).nan_to_num() * step.half().float()).flatten(-2)
