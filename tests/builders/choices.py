"""Multiple-choice tasks of lm-evaluation-harness on local data: continuations of a text, and counting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

TASK = "continuations"
_TASK_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_choices(folder: Path, text: str, *, questions: int, context_words: int, choice_words: int) -> Path:
    """Write the task and its data into ``folder``: four continuations each, three of them from elsewhere."""
    words = text.split()
    random = np.random.default_rng(5)
    places = random.permutation(len(words) - context_words - choice_words)

    def piece(place: int) -> str:
        return " ".join(words[place + context_words : place + context_words + choice_words])

    docs = []
    for place, *others in places[: 4 * questions].reshape(questions, 4):
        answer = int(random.integers(4))
        choices = [piece(other) for other in others]
        choices.insert(answer, piece(place))
        context = " ".join(words[place : place + context_words])
        docs.append({"context": context, "choices": choices, "answer": answer})
    return _write_task(folder, docs)


def write_counting(folder: Path, *, questions: int) -> Path:
    """Write a task of counting in steps into ``folder``: "Count: 4, 7, 10, 13," continues with 16, not 17."""
    random, docs = np.random.default_rng(5), []
    for _ in range(questions):
        start, step = int(random.integers(1, 60)), int(random.integers(1, 10))
        numbers = [start + step * index for index in range(5)]
        wrong = random.choice([n for n in range(-9, 10) if n not in (0, -step)], size=3, replace=False)
        choices = [str(numbers[4] + int(off)) for off in wrong]
        answer = int(random.integers(4))
        choices.insert(answer, str(numbers[4]))
        context = f"Count: {', '.join(map(str, numbers[:4]))},"
        docs.append({"context": context, "choices": choices, "answer": answer})
    return _write_task(folder, docs)


def _write_task(folder: Path, docs: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "docs.json"
    data.write_text("\n".join(json.dumps(doc) for doc in docs))
    (folder / f"{TASK}.yaml").write_text(_TASK_YAML.format(task=TASK, data=data))
    return folder


def harness_version() -> str:
    """Version of lm-eval, or that it is not there."""
    try:
        return version("lm-eval")
    except PackageNotFoundError:
        return "not installed"


def harness_scores(out: Path, scratch: Path, *options: str) -> dict[str, Any]:
    """variant -> task -> metric -> value of ``evaluate OUT --tasks`` on the tasks of ``scratch``/tasks.

    In a process of its own, as a user runs it: the harness and what it imports warn in many ways.
    """
    command = [sys.executable, "-m", "nirvana_deploy", "evaluate", str(out), "--json", "--threads", "1"]
    own = ["--tasks", TASK, "--include-path", str(scratch / "tasks")]
    offline = {"HF_HOME": str(scratch / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *own, *options], capture_output=True, text=True, check=False, env={**os.environ, **offline}
    )
    assert done.returncode == 0, done.stderr
    variants: dict[str, Any] = json.loads(done.stdout)["tasks"]["variants"]
    return variants
