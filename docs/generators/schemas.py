"""JSON Schemas of the files in an output folder, from the types that this package reads them as.

``schemas/NAME.schema.json`` of the built site; ``:::{schemas}`` lists them.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import msgspec
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from nirvana_deploy.output.kinds.workloads import TrafficContestRecord, WorkloadsRecord
from nirvana_deploy.output.layout import (
    ANSWERS_FILE,
    BENCHMARK_FILE,
    MANIFEST,
    NTK_FILE,
    PLAN_FILE,
    QUALITY_FILE,
    SEARCH_FILE,
    TASKS_FILE,
    WORKLOADS_FILE,
)
from nirvana_deploy.output.manifest import Manifest
from nirvana_deploy.output.record_kinds import (
    BenchmarkRecord,
    ContestRecord,
    KernelRecord,
    QualityRecord,
    TasksRecord,
)
from nirvana_deploy.output.results import AnswersWritten
from nirvana_deploy.prune.plan import PrunePlan
from nirvana_deploy.quantize.graph.linears import RECORD_FILE
from nirvana_deploy.quantize.int8.spec import QuantizationRecord
from nirvana_deploy.runtime.tensorrt.record import EngineRecord
from nirvana_deploy.search.parts import Part
from nirvana_deploy.search.point import Found
from nirvana_deploy.search.record import SearchRecord

KINDS: dict[str, tuple[str, Any]] = {
    "manifest": (MANIFEST, Manifest),
    "plan": (PLAN_FILE, PrunePlan),
    "quality": (QUALITY_FILE, QualityRecord),
    "answers": (ANSWERS_FILE, AnswersWritten),
    "benchmark": (BENCHMARK_FILE, BenchmarkRecord),
    "workloads": (WORKLOADS_FILE, WorkloadsRecord),
    "contest": ("benchmark --out FILE", ContestRecord),
    "contest-workloads": ("benchmark --workload NAME --out FILE", TrafficContestRecord),
    "tasks": (TASKS_FILE, TasksRecord),
    "ntk": (NTK_FILE, KernelRecord),
    "quantization": (f"onnx-*/{RECORD_FILE}", QuantizationRecord),
    "engine": ("engine/*.json", EngineRecord),
    "point": ("points/*.json", Found),
    "part": ("parts/*.json", Part),
    "search": (SEARCH_FILE, SearchRecord),
}
"""Name of the schema: which files it describes, and what they are read as."""
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema called ``name``."""
    files, kind = KINDS[name]
    said = inspect.cleandoc(kind.__doc__ or "").replace("\n", " ")
    return {"$schema": _DIALECT, "title": files, "description": said, **msgspec.json.schema(kind)}


def write_schemas(folder: Path) -> None:
    """Write every schema into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KINDS:
        text = json.dumps(schema_of(name), indent=2) + "\n"
        (folder / f"{name}.schema.json").write_text(text, encoding="utf-8")


class Schemas(SphinxDirective):
    """A list of all schemas, with links."""

    def run(self) -> list[nodes.Node]:
        """One entry a schema."""
        up = "../" * self.env.docname.count("/")
        found = nodes.bullet_list()
        for name, (files, _) in KINDS.items():
            link = nodes.reference("", f"{name}.schema.json", refuri=f"{up}schemas/{name}.schema.json")
            said = nodes.paragraph("", "", nodes.literal("", files), nodes.Text(": "), link)
            said += nodes.Text(f". {schema_of(name)['description']}")
            found += nodes.list_item("", said)
        return [found]


def _written(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        write_schemas(Path(app.outdir) / "schemas")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive, and write the files behind the pages."""
    app.add_directive("schemas", Schemas)
    app.connect("build-finished", _written)
    return {"parallel_read_safe": True}
