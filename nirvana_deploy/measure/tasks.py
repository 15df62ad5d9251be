"""Tasks of lm-evaluation-harness on ONNX folders and checkpoints, through the harness' Python API.

An ONNX folder runs in the harness' ``onnxruntime`` model, in the session that a deployment has; it scores
given texts. Generating tasks run on checkpoints, with transformers. A checkpoint whose layers differ may run
its remote module only if that file is, byte for byte, the one this package ships.
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

from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.model import modeling_nirvana
from nirvana_deploy.model.checkpoint import config_json
from nirvana_deploy.output.layout import MODEL_FILE

_OWN_MODULE = "modeling_nirvana.py"


def require_tasks(names: Sequence[str]) -> None:
    """Raise MissingExtraError unless the harness is installed."""
    _harness(names)


def evaluate_tasks(
    models: Mapping[str, Path],
    names: Sequence[str],
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run the tasks ``names`` on every one of ``models``, on ``limit`` examples each [all].

    A model is an ONNX folder or a checkpoint folder, which is computed in float32. ``include_path`` is a
    folder with the yaml files of tasks that the harness does not bring.

    Returns ``variants``: name -> task -> metric -> value, as the harness reports them ("acc,none",
    "acc_stderr,none"). Raises MissingExtraError without the harness, and NirvanaError for a checkpoint that
    asks for code which is not this package's, or a task that the harness cannot run.
    """
    harness = _harness(names)
    if include_path is not None and not include_path.is_dir():
        raise NirvanaError(
            f"{include_path} is not a folder.",
            hint="It must hold the yaml files of the tasks: --include-path DIR",
        )
    arguments = {name: _model_arguments(folder) for name, folder in models.items()}
    variants = {}
    with progress.task(f"Tasks {', '.join(names)}", len(models)) as advance:
        for name, model_arguments in arguments.items():
            try:
                with redirect_stdout(sys.stderr):  # the harness prints
                    found = harness.simple_evaluate(
                        **model_arguments,
                        **_own_tasks(include_path),
                        tasks=list(names),
                        limit=limit,
                        log_samples=False,
                    )
            except (KeyError, ValueError, OSError) as error:  # unknown task; data that cannot be fetched
                raise NirvanaError(
                    f"lm-evaluation-harness cannot run {', '.join(names)} on the {name} model: {error}.",
                    hint="lm-eval ls tasks lists the tasks; their data come from the hub. Tasks of your own: "
                    "--include-path DIR",
                ) from error
            except NotImplementedError as error:
                raise NirvanaError(
                    f"{', '.join(names)} has a task that generates text, which lm-evaluation-harness "
                    "does not do with an ONNX model.",
                    hint="Run it on the checkpoints: --tasks-on checkpoint",
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


def _own_tasks(include_path: Path | None) -> dict[str, Any]:
    """The argument that adds a folder of tasks, if any."""
    if include_path is None:
        return {}
    tasks = importlib.import_module("lm_eval.tasks")
    return {"task_manager": tasks.TaskManager(include_path=str(include_path))}


def _model_arguments(folder: Path) -> dict[str, Any]:
    """Return the harness' model for ``folder`` and its arguments."""
    if (folder / MODEL_FILE).is_file():
        return {"model": "onnxruntime", "model_args": {"pretrained": str(folder)}}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the harness' default is cuda
    return {"model": "hf", "model_args": _checkpoint_arguments(folder), "device": device}


def _checkpoint_arguments(folder: Path) -> dict[str, Any]:
    """Arguments of the harness' "hf" model."""
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
    """Return the metrics of one task, those called "name,filter"."""
    return {
        metric: float(value)
        for metric, value in result.items()
        if "," in metric and isinstance(value, int | float)
    }
