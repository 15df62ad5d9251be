"""The record of the long form, one entry a subject, and the table that README.md shows of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD, PAGE = HERE.parent / "results" / "campaign.json", HERE / "README.md"
_BEGIN, _END = "<!-- counts: begin -->", "<!-- counts: end -->"


def keep(found: dict[str, dict[str, Any]]) -> None:
    """Put what subjects found into the record, and the table onto the page."""
    from nirvana_deploy.base.machine import environment

    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name, part in found.items():
        record[name] = {**part, "environment": environment()}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), record))


def with_table(page: str, record: dict[str, dict[str, Any]]) -> str:
    """The page with the table of ``record`` between its marks."""
    before, rest = page.split(_BEGIN)
    return f"{before}{_BEGIN}\n{table(record)}\n{_END}{rest.split(_END)[1]}"


def table(record: dict[str, dict[str, Any]]) -> str:
    """One row a subject."""
    rows = ["| Subject | Count | Trials | Failed | Seed |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, part in record.items():
        count = f"{part['count']:,} {part['unit']}"
        rows.append(f"| `{name}` | {count} | {part['trials']} | {part['failed']} | {part['seed']} |")
    return "\n".join(rows)
