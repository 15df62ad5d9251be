"""Write the report from the records of a run."""

from __future__ import annotations

from pathlib import Path

from nirvana_deploy.output.run import Run
from nirvana_deploy.report.report import write_report


def write_pages(run: Run) -> Path:
    """Write report.md and report.html from the records of the run; always anew, it is cheap."""

    def work() -> None:
        write_report(run.out, progress=run.progress)

    run.stage("report", ["report.md", "report.html"], work, redo=True)
    return run.out / "report.html"
