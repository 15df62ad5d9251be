"""A finished benchmark against an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.measure.recipe import Tolerance
from nirvana_deploy.output.kinds.workloads import WorkloadsRecord
from nirvana_deploy.output.layout import BENCHMARK_FILE, WORKLOADS_FILE
from nirvana_deploy.output.record_kinds import BenchmarkRecord
from nirvana_deploy.output.records import Records, read_records
from nirvana_deploy.report.compare.against import Changes, changes_since
from nirvana_deploy.report.compare.alike import Folder

_SCHEMA = 1


def compare_with_earlier(
    now: Path | str, before: Path | str, *, tolerance: float = Tolerance.tolerance
) -> Changes:
    """Say what got slower or worse beyond noise since an earlier benchmark.

    Each is an output folder, a benchmark.json, a workloads.json, or what ``benchmark --out`` wrote.
    ``tolerance`` is the least change that counts, as a share. Raises NirvanaError for what was not measured,
    for another model, and for benchmarks without a model in common; ``require_none_worse`` of the result
    raises RegressionError.
    """
    asked = Tolerance(tolerance=tolerance)
    return changes_since(_measured(Path(before)), _measured(Path(now)), tolerance=asked.tolerance)


def _measured(path: Path) -> Folder:
    label = str(path)
    if not path.is_dir():
        return Folder(label, _of_file(path))
    records = read_records(path)
    if records.benchmark is None and not records.workloads:
        raise NirvanaError(f"{path} was not measured.", hint=f"Measure it: nirvana-deploy benchmark {path}")
    return Folder(label, records)


def _of_file(path: Path) -> Records:
    """A benchmark or a contest, or what was timed under workloads alone."""
    hint = "Name an output folder, or its benchmark.json."
    keys = read_json(path, dict[str, Any], hint=hint)
    if "workloads" in keys and "variants" not in keys:
        under: Any = read_json(path, WorkloadsRecord, schema=_SCHEMA, hint=hint)
        return Records(None, None, None, dict(under))
    record: Any = read_json(path, BenchmarkRecord, schema=_SCHEMA, hint=hint)
    return Records(None, None, dict(record), _workloads_beside(path))


def _workloads_beside(benchmark: Path) -> dict[str, Any] | None:
    """What was kept with a folder's benchmark.json."""
    beside = benchmark.with_name(WORKLOADS_FILE)
    if benchmark.name != BENCHMARK_FILE or not beside.is_file():
        return None
    return dict(read_json(beside, WorkloadsRecord, schema=_SCHEMA))
