"""optimum-onnx for the tests: in an environment of its own, for it needs an older transformers than we do."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

VERSION = "0.1.0"
_SCRIPT = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
answers = []
for job in json.load(open(sys.argv[1])):
    model = ORTModelForCausalLM.from_pretrained(job["folder"])
    prompts, mask = torch.tensor(job["prompts"]), torch.tensor(job["mask"])
    new = {"min_new_tokens": job["new_tokens"], "max_new_tokens": job["new_tokens"]}
    found = model.generate(prompts, attention_mask=mask, do_sample=False, pad_token_id=0, **new)
    answers.append(found[:, prompts.shape[1] :].tolist())
json.dump(answers, open(sys.argv[2], "w"))
"""


def installed_optimum(cache: pytest.Cache) -> Path:
    """The Python of an environment in pytest's cache with optimum-onnx, made once; skips where it cannot be.

    Everything but optimum, transformers and what it pins is taken from the environment of the tests.
    """
    folder = cache.mkdir(f"optimum-onnx-{VERSION}")
    python = folder / "venv" / "bin" / "python"
    if (folder / "ready").is_file():
        return python
    venv.create(folder / "venv", with_pip=True, clear=True)
    [own] = (folder / "venv" / "lib").glob("python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (own / "tests.pth").write_text("\n".join(ours) + "\n")
    command = [str(python), "-m", "pip", "install", "--quiet", f"optimum-onnx=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"pip could not install optimum-onnx {VERSION}: {done.stderr.strip()[-300:]}")
    (folder / "ready").touch()
    return python


def run_optimum(python: Path, jobs: Sequence[dict[str, Any]], scratch: Path) -> list[list[list[int]]]:
    """New tokens of each row of each job {folder, prompts, mask, new_tokens}. One process for all of them."""
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    command = [str(python), "-c", _SCRIPT, str(scratch / "jobs.json"), str(scratch / "answers.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answers: list[list[list[int]]] = json.loads((scratch / "answers.json").read_text())
    return answers
