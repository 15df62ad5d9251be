"""Zero-shot tasks from local JSONL files, checked row by row, as tasks of lm-evaluation-harness.

A row is of one of three kinds, told by its keys: one query with several choices, several contexts with one
continuation, a context and the word that follows it. The harness scores log P(continuation | context).
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import HALF_A_PAIR, parse_json, read_text

SUFFIX = ".jsonl"
_METRICS = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "openbookqa": "acc_norm"}
"""Metric by file stem, as the authors of NIRVANA report them; accuracy for any other task."""

_GOLD = "gold"


@dataclass(frozen=True)
class Kind:
    """One form of row: its keys, and how the harness reads them."""

    text: str
    """Key of a string."""
    options: str | None
    """Key of the list of strings that ``gold`` points into, if any."""
    metrics: tuple[str, ...]
    harness: Mapping[str, str]

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a row."""
        return (self.text, self.options, _GOLD) if self.options else (self.text, "continuation")


MULTIPLE_CHOICE = Kind(
    "query",
    "choices",
    ("acc", "acc_norm"),
    {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": _GOLD,
    },
)
TWO_CONTEXTS = Kind(
    "continuation",
    "context_options",
    ("acc",),  # one continuation: there is no length to divide by
    {
        "output_type": "multiple_choice",
        "doc_to_text": _GOLD,  # an index here tells the harness that the contexts are the choices
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
    },
)
LAST_WORD = Kind(
    "context",
    None,
    ("acc",),
    {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "continuation"},
)
KINDS = (MULTIPLE_CHOICE, TWO_CONTEXTS, LAST_WORD)


@dataclass(frozen=True)
class LocalTask:
    """A checked file of rows of one kind."""

    path: Path
    kind: Kind
    rows: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The file's stem."""
        return self.path.stem

    @property
    def metric(self) -> str:
        """The metric that stands for the task."""
        return _METRICS.get(self.name, "acc")

    def record(self) -> dict[str, Any]:
        """What a result says about its data."""
        return {
            "file": self.path.name,
            "sha256": sha256_of(self.path),
            "rows": len(self.rows),
            "metric": self.metric,
        }


def is_local(name: str) -> bool:
    """Whether ``name`` is a file or folder and not the name, or the yaml file, of a task of the harness."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        return False
    return path.suffix == SUFFIX or path.name != name or path.is_dir()


def read_tasks(paths: Sequence[Path]) -> tuple[LocalTask, ...]:
    """Read and check files of rows; a folder stands for its .jsonl files, in alphabetical order.

    Raises NirvanaError for a missing or empty file, two files of one name, and a malformed row, whose line
    and key it names.
    """
    tasks = [read_task(file) for path in paths for file in _files(path)]
    seen: dict[str, Path] = {}
    for task in tasks:
        if task.name in seen:
            raise NirvanaError(
                f"{seen[task.name]} and {task.path} are both the task {task.name}.",
                hint="A task is named after its file: leave one out, or rename it.",
            )
        seen[task.name] = task.path
    return tuple(tasks)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files:
        raise NirvanaError(f"{path} holds no {SUFFIX} file.", hint="--tasks FILE.jsonl, or a folder of them.")
    return files


def read_task(path: Path) -> LocalTask:
    """Read and check one file; raises NirvanaError as ``read_tasks`` does."""
    text = read_text(path, hint="--tasks takes .jsonl files, folders of them, or names of tasks.")
    kind, rows = None, []
    # not splitlines: JSON allows line separators inside a string that it would cut at
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = _parsed(line, f"{path}, line {number}")
            kind = kind or _nearest_kind(row, f"{path}, line {number}")
            rows.append(_checked(row, kind, f"{path}, line {number}"))
    if kind is None:
        raise NirvanaError(f"{path} is empty.", hint=_FORMS)
    return LocalTask(path, kind, rows)


def _parsed(line: str, where: str) -> Mapping[str, Any]:
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise NirvanaError(f"{where} is {_short(row)}, not an object.", hint=_FORMS)
    return row


_FORMS = "A row has the keys " + "; or ".join(", ".join(kind.keys) for kind in KINDS) + "."


def _nearest_kind(row: Mapping[str, Any], where: str) -> Kind:
    """The kind that shares most keys with ``row``: a key that is missing is then named."""
    nearest = max(KINDS, key=lambda kind: len(row.keys() & set(kind.keys)) / len(kind.keys))
    if row.keys().isdisjoint(nearest.keys):
        raise NirvanaError(f"{where} has the keys {', '.join(row) or 'of nothing'}.", hint=_FORMS)
    return nearest


def _checked(row: Mapping[str, Any], kind: Kind, where: str) -> Mapping[str, Any]:
    """The keys of ``kind``; others are left out."""
    for key in kind.keys:
        if key not in row:
            other = next((k for k in KINDS if k is not kind and row.keys() >= set(k.keys)), None)
            if other:
                raise NirvanaError(
                    f"{where} is of another kind ({', '.join(other.keys)}) than the rows before it "
                    f"({', '.join(kind.keys)}): it has no key {key!r}.",
                    hint="One file is one task: put rows of another kind in another file.",
                )
            raise NirvanaError(f"{where} has no key {key!r}.", hint=_FORMS)
        _require(key, row, kind, where)
    return {key: row[key] for key in kind.keys}


def _require(key: str, row: Mapping[str, Any], kind: Kind, where: str) -> None:
    value = row[key]
    if key == kind.options:
        good, wanted = _are_options(value), "a list of at least two texts, none of them blank"
    elif key == _GOLD:
        last = len(row[str(kind.options)]) - 1
        good = type(value) is int and 0 <= value <= last
        wanted = f"an index into {kind.options}, from 0 to {last}"
    else:
        good, wanted = _is_text(value), "a text that is not blank"
    if not good:
        raise NirvanaError(f"{where}, key {key!r} is {_short(value)}, not {wanted}.")


def _are_options(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 2 and all(map(_is_text, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not HALF_A_PAIR.search(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def harness_task(task: LocalTask) -> Any:
    """Return the harness' task object for ``task``: 0-shot, its data in memory."""
    datasets, api = importlib.import_module("datasets"), importlib.import_module("lm_eval.api.task")
    data = datasets.Dataset.from_list([_prompted(row, task.kind) for row in task.rows])
    config = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": data},
        "test_split": "test",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in task.kind.metrics
        ],
        **task.kind.harness,
    }
    with _without_warnings(
        api.__name__
    ):  # every custom_dataset is told of options that this one doesn't have
        return api.ConfigurableTask(config=config)


def _prompted(row: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The row with what stands between context and continuation, where the harness adds nothing itself."""
    if kind is MULTIPLE_CHOICE:
        return {**row, "query": prompt_of(row["query"])}
    if kind is LAST_WORD:
        return {**row, "continuation": f" {row['continuation']}"}
    return dict(row)


def prompt_of(query: str) -> str:
    """The query, and "Answer:" on its own line after a question that is marked as one."""
    is_question = any(line.startswith("Question: ") for line in query.split("\n"))
    return f"{query.rstrip()}\nAnswer:" if is_question else query


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
