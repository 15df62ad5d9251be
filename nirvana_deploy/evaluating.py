"""Quality of a finished folder, measured again: texts, the tangent kernel, tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nirvana_deploy.measure.tasks import require_tasks
from nirvana_deploy.measuring import TasksOn, quality, refresh_quality, tangent_kernel, tasks
from nirvana_deploy.model.checkpoint import load_tokenizer
from nirvana_deploy.progress import SILENT, Progress
from nirvana_deploy.run import Run
from nirvana_deploy.stages import checked_shape, evaluation_windows, write_pages
from nirvana_deploy.variants import CHECKPOINT


def evaluate_folder(
    out: Path,
    *,
    eval_text: Path | None = None,
    window_tokens: int | None = None,
    max_windows: int | None = None,
    ntk_windows: int | None = None,
    task_names: Sequence[str] = (),
    task_limit: int | None = None,
    task_folder: Path | None = None,
    tasks_on: TasksOn | None = None,
    threads: int | None = None,
    runtime: str | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure quality of an output folder again; rewrites quality.json, benchmark.json and the report.

    On ``eval_text`` in windows of ``window_tokens`` tokens [256], at most ``max_windows`` of them [16]; else
    on the held-out windows; in ``runtime`` [onnxruntime-cpu]. ``ntk_windows`` also measures the tangent
    kernels on so many held-out windows, ``task_names`` runs tasks of lm-evaluation-harness on ``task_limit``
    examples each [all], those of ``task_folder`` among them, on the models that ``tasks_on`` says [the ONNX
    ones]. A folder without ONNX model is measured by these two alone. Returns quality.json with ``ntk`` and
    ``tasks`` added.
    """
    run = Run.open(out, progress=progress)
    result: dict[str, Any] = {}
    if task_names:
        require_tasks(task_names)
    if "onnx" in run.manifest["stages"] or not (ntk_windows or task_names):
        windows = None
        if eval_text is not None:
            checked_shape(out / CHECKPOINT, seq_len=window_tokens or 1)
            windows = evaluation_windows(
                eval_text,
                load_tokenizer(out / CHECKPOINT),
                progress,
                seq_len=window_tokens,
                max_sequences=max_windows,
            )
        result = quality(run, threads=threads, windows=windows, runtime=runtime, redo=True)
        refresh_quality(run)
    if ntk_windows:
        result = {**result, "ntk": tangent_kernel(run, windows=ntk_windows)}
    if task_names:
        found = tasks(run, task_names, limit=task_limit, include_path=task_folder, on=tasks_on)
        result = {**result, "tasks": found}
    write_pages(run)
    return result
