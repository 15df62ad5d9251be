"""Tasks of lm-evaluation-harness on ONNX folders and checkpoints: its own, by name, or local files of rows.

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
from nirvana_deploy.measure.recipe import Evaluation
from nirvana_deploy.measure.zero_shot.local_tasks import LocalTask, harness_task, is_local, read_tasks
from nirvana_deploy.measure.zero_shot.packed import attends_to_all, log_likelihoods
from nirvana_deploy.measure.zero_shot.task_means import task_means
from nirvana_deploy.model import modeling_nirvana
from nirvana_deploy.model.checkpoint import config_json
from nirvana_deploy.output.layout import MODEL_FILE

_OWN_MODULE = "modeling_nirvana.py"
_HF = "hf"
"""The harness' name for transformers."""
_TOKENS_PER_SEQUENCE = 64
"""What one sequence of a batch stands for where sequences are packed."""


def require_tasks(names: Sequence[str]) -> None:
    """Raise MissingExtraError unless the harness is installed, NirvanaError for a bad local file."""
    _harness(names)
    _local_tasks(names)


def evaluate_tasks(
    models: Mapping[str, Path],
    names: Sequence[str],
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    batch_size: int = Evaluation.batch_size,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run the tasks ``names`` on every one of ``models``, on the first ``limit`` examples of each [all].

    A model is an ONNX folder or a checkpoint folder, which is computed in float32, ``batch_size`` sequences
    of about equal length at a time; with local files a decoder computes common beginnings once (``packed``).
    A name is a task of the harness, a .jsonl file (``local_tasks``) or a folder of such files; local files
    need no network. ``include_path`` is a folder with the yaml files of tasks that the harness lacks.

    Returns ``variants``: name -> task -> metric -> value, as the harness reports them ("acc,none",
    "acc_stderr,none"); with local files, ``files``: task -> sha256, number of rows and the metric that stands
    for it; with several, ``means`` of these metrics (``task_means``), compared with the first model.
    Raises MissingExtraError without the harness, and NirvanaError for a malformed file, a checkpoint that
    asks for code which is not this package's, or a task that the harness cannot run.
    """
    harness, local = _harness(names), _local_tasks(names)
    if include_path is not None and not include_path.is_dir():
        raise NirvanaError(
            f"{include_path} is not a folder.",
            hint="It must hold the yaml files of the tasks: --include-path DIR",
        )
    hub = [name for name in names if not is_local(name)]
    arguments = {name: _model_arguments(folder, batch_size) for name, folder in models.items()}
    labels = [*(task.name for task in local), *hub]
    work = {
        **_task_manager(include_path, hub),
        "tasks": [*map(harness_task, local), *hub],
        "limit": limit,
        "log_samples": bool(local),
    }
    found = {}
    with progress.task(f"Tasks {', '.join(labels)}", len(models)) as advance:
        for name, model_arguments in arguments.items():
            if local and model_arguments["model"] == _HF:
                model_arguments = {"model": packing_model(**model_arguments)}
            found[name] = _run(harness, {**model_arguments, **work}, labels, name)
            advance(1)
    variants = {
        name: {task: _numbers(result) for task, result in run["results"].items()}
        for name, run in found.items()
    }
    return {
        "schema": 1,
        "harness": _version(),
        "limit": limit,
        **({"files": {task.name: task.record() for task in local}} if local else {}),
        "variants": variants,
        **(
            {"means": task_means({name: _scores(run, local) for name, run in found.items()})} if local else {}
        ),
    }


def _local_tasks(names: Sequence[str]) -> tuple[LocalTask, ...]:
    local = read_tasks([Path(name) for name in names if is_local(name)])
    twice = {task.name for task in local} & set(names)
    if twice:
        raise NirvanaError(
            f"{', '.join(sorted(twice))} is asked for both as a file and as a task of the harness.",
            hint="Leave one out, or rename the file.",
        )
    return local


def _scores(run: Mapping[str, Any], local: Sequence[LocalTask]) -> dict[str, list[float]]:
    """Task -> the score of each of its examples, in the order of the file."""
    return {task.name: [float(sample[task.metric]) for sample in run["samples"][task.name]] for task in local}


def _run(
    harness: ModuleType, arguments: Mapping[str, Any], labels: Sequence[str], model: str
) -> Mapping[str, Any]:
    """What the harness finds; raises NirvanaError for what it cannot run."""
    try:
        with redirect_stdout(sys.stderr):  # the harness prints
            result: Mapping[str, Any] = harness.simple_evaluate(**arguments)
    except (KeyError, ValueError, OSError) as error:  # unknown task; data that cannot be fetched
        raise NirvanaError(
            f"lm-evaluation-harness cannot run {', '.join(labels)} on the {model} model: {error}.",
            hint="lm-eval ls tasks lists the tasks; their data come from the hub. Tasks of your own: "
            "--tasks FILE.jsonl, or --include-path DIR",
        ) from error
    except NotImplementedError as error:
        raise NirvanaError(
            f"{', '.join(labels)} has a task that generates text, which lm-evaluation-harness "
            "does not do with an ONNX model.",
            hint="Run it on the checkpoints: --tasks-on checkpoint",
        ) from error
    return result


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


def _task_manager(include_path: Path | None, names: Sequence[str]) -> dict[str, Any]:
    """The argument that finds the tasks ``names``, if it is not the harness' default."""
    if names and include_path is None:
        return {}
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    if not names:  # nothing to find: thousands of yaml files stay unread
        return {"task_manager": manager(include_defaults=False)}
    return {"task_manager": manager(include_path=str(include_path))}


def _model_arguments(folder: Path, batch_size: int) -> dict[str, Any]:
    """Return the harness' model for ``folder`` and its arguments."""
    folder = folder.absolute()  # a relative path of two parts would pass for a name on the hub
    if (folder / MODEL_FILE).is_file():
        return {"model": "onnxruntime", "model_args": {"pretrained": str(folder)}}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the harness' default is cuda
    return {
        "model": _HF,
        "model_args": _checkpoint_arguments(folder),
        "device": device,
        "batch_size": batch_size,
    }


def packing_model(model: str, model_args: Mapping[str, Any], device: str, batch_size: int) -> Any:
    """Return the harness' model, whose log-likelihoods are computed in packs if it is a decoder.

    One whose layers see less than the context is left to the harness, sequence by sequence.
    """
    kind = importlib.import_module("lm_eval.api.registry").get_model(model)
    lm = kind.create_from_arg_obj(model_args, {"device": device, "batch_size": batch_size})

    def in_packs(
        requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        bar = importlib.import_module("tqdm").tqdm
        with bar(total=len(requests), disable=disable_tqdm, desc="Log-likelihoods in packs") as shown:
            return log_likelihoods(
                lm.model,
                [(context, continuation) for _, context, continuation in requests],
                max_length=lm.max_length,
                max_tokens=_TOKENS_PER_SEQUENCE * batch_size,
                advance=shown.update,
            )

    if lm.backend == "causal" and attends_to_all(lm.config, tokens=lm.max_length):
        lm._loglikelihood_tokens = in_packs
    return lm


def _checkpoint_arguments(folder: Path) -> dict[str, Any]:
    """Arguments of the harness' "hf" model."""
    arguments: dict[str, Any] = {"pretrained": str(folder), "dtype": "float32", "use_safetensors": True}
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
