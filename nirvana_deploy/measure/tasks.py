"""Tasks of lm-evaluation-harness on checkpoints, dense beside pruned, through the harness' own Python API.

The harness loads models with transformers. A pruned checkpoint whose layers differ brings the small module
that computes it; the permission to run it is given only when that file is, byte for byte, the one this
package ships. No other code of a folder is ever run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nirvana_deploy.artifact import sha256_of
from nirvana_deploy.errors import MissingExtraError, NirvanaError
from nirvana_deploy.model import modeling_nirvana
from nirvana_deploy.model.checkpoint import config_json
from nirvana_deploy.progress import SILENT, Progress

_OWN_MODULE = "modeling_nirvana.py"


def require_tasks(names: Sequence[str]) -> None:
    """Raise MissingExtraError unless the harness is installed, to be told so before any work."""
    _harness(names)


def evaluate_tasks(
    checkpoints: Mapping[str, Path],
    names: Sequence[str],
    *,
    limit: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run the tasks ``names`` on every one of ``checkpoints`` in float32, on ``limit`` examples each [all].

    Returns ``variants``: name -> task -> metric -> value, as the harness reports them ("acc,none",
    "acc_stderr,none"). Raises MissingExtraError without the harness, and NirvanaError for a checkpoint that
    asks for code which is not this package's, or a task that the harness cannot run.
    """
    harness = _harness(names)
    arguments = {name: _model_arguments(folder) for name, folder in checkpoints.items()}
    variants = {}
    with progress.task(f"Tasks {', '.join(names)}", len(checkpoints)) as advance:
        for name, model_args in arguments.items():
            try:
                with redirect_stdout(sys.stderr):  # the harness prints
                    found = harness.simple_evaluate(
                        model="hf",
                        model_args=model_args,
                        tasks=list(names),
                        device="cuda" if torch.cuda.is_available() else "cpu",  # its default is cuda
                        limit=limit,
                        log_samples=False,
                    )
            except (KeyError, ValueError, OSError) as error:  # unknown task; data that cannot be fetched
                raise NirvanaError(
                    f"lm-evaluation-harness cannot run {', '.join(names)} on the {name} model: {error}.",
                    hint="lm-eval ls tasks lists the tasks; their data come from the hub.",
                ) from error
            variants[name] = {task: _numbers(result) for task, result in found["results"].items()}
            advance(1)
    return {"schema": 1, "harness": _version(), "limit": limit, "variants": variants}


def _harness(names: Sequence[str]) -> ModuleType:
    try:
        return importlib.import_module("lm_eval")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise MissingExtraError(f"--tasks {','.join(names)}", package="lm-eval", extra="eval") from error


def _version() -> str | None:
    try:
        return version("lm-eval")
    except PackageNotFoundError:
        return None


def _model_arguments(folder: Path) -> dict[str, Any]:
    """What the harness' "hf" model is made from."""
    arguments: dict[str, Any] = {"pretrained": str(folder), "dtype": "float32"}
    if "auto_map" not in config_json(folder):
        return arguments
    own = Path(modeling_nirvana.__file__)
    if (folder / _OWN_MODULE).is_file() and sha256_of(folder / _OWN_MODULE) == sha256_of(own):
        return {**arguments, "trust_remote_code": True}
    raise NirvanaError(
        f"{folder} asks to run code that is not this package's: {_OWN_MODULE} is missing or differs.",
        hint="Make the checkpoint again with this version: repeat the prune command with --force.",
    )


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one task, which are called "name,filter"; the harness puts other facts between them."""
    return {
        metric: float(value)
        for metric, value in result.items()
        if "," in metric and isinstance(value, int | float)
    }
