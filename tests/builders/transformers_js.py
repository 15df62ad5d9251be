"""transformers.js for the tests: the npm package, driven by a script of node."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

VERSION = "4.3.1"


def installed_transformers_js(cache: pytest.Cache) -> Path:
    """A folder in pytest's cache with transformers.js in it, installed once; skips where that cannot be."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("transformers.js runs in node, and node or npm is not installed here")
    folder = cache.mkdir(f"transformers.js-{VERSION}")
    if not (folder / "ready").is_file():
        (folder / "package.json").write_text('{"private": true}')
        # without scripts: that of onnxruntime-node would fetch CUDA libraries
        quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        command = ["npm", "install", *quiet, f"@huggingface/transformers@{VERSION}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"npm could not install transformers.js: {done.stderr.strip()[-300:]}")
        (folder / "ready").touch()
    shutil.copyfile(Path(__file__).with_suffix(".mjs"), folder / "transformers_js.mjs")
    return folder


def run_transformers_js(folder: Path, jobs: Sequence[dict[str, Any]], scratch: Path) -> list[list[list[int]]]:
    """The answers to ``jobs``: see transformers_js.mjs. One process for all of them."""
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    command = ["node", "transformers_js.mjs", str(scratch / "jobs.json"), str(scratch / "answers.json")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answers: list[list[list[int]]] = json.loads((scratch / "answers.json").read_text())
    return answers
