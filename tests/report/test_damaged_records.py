"""Whatever stands in a record, it is told or refused in a sentence: one value at a time is another."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from builders.reports import RECORDS, frozen, frozen_records, write_records

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.output.inspection import inspect_path
from nirvana_deploy.output.records import read_records
from nirvana_deploy.prune.plan_file import read_plan
from nirvana_deploy.report.report import report_context

OTHERS: tuple[Any, ...] = (None, True, -1, 0, 1.5, 10**30, "x", "", [], {}, [[]], {"a": 1})
TRIALS = 120


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key path below a value; of a list the first two entries."""
    for key in value if isinstance(value, dict) else range(len(value[:2])) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def with_another(record: Any, path: tuple[Any, ...], other: Any) -> Any:
    changed = copy.deepcopy(record)
    around = changed
    for key in path[:-1]:
        around = around[key]
    around[path[-1]] = other
    return changed


def test_a_value_that_is_another_is_told_or_refused(tmp_path: Path) -> None:
    whole = {name: frozen(name) for name in RECORDS}
    write_records(tmp_path, frozen_records())
    files = {name: next(tmp_path.rglob(f"{name}.json")) for name in RECORDS}
    choice = random.Random(20)
    refused = 0
    for _ in range(TRIALS):
        name = choice.choice(RECORDS)
        changed = with_another(whole[name], choice.choice(list(places(whole[name]))), choice.choice(OTHERS))
        files[name].write_text(json.dumps(changed))
        with suppress(NirvanaError):
            report_context(read_records(tmp_path))
            inspect_path(tmp_path).as_json()
            read_plan(tmp_path / "plan.json")
            refused -= 1
        refused += 1
        files[name].write_text(json.dumps(whole[name]))
    assert TRIALS / 4 < refused < TRIALS
